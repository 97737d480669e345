// What newer compilers take from a C or C++ library that manylinux_2_28 does not have: the library's
// own copies, which hidden.map hides. `make wheel` looks at the symbols that are left.
#include <new>
#include <sstream>

#ifdef __GLIBCXX__
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
#endif

extern "C" {
// Newer headers count references without atomics where this says one thread; ours always has several.
char __libc_single_threaded = 0;

// The first version of log, whose values are those of the version of glibc 2.29.
#if defined(__GLIBC__) && defined(__x86_64__)
double first_log(double x);
__asm__(".symver first_log, log@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
double first_log(double x);
__asm__(".symver first_log, log@GLIBC_2.17");
#else
double first_log(double x) __asm__("__real_log");
#endif

double __wrap_log(double x) { return first_log(x); }
}
