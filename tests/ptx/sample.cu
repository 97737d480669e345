// What a compiler of CUDA makes of device functions, arrays of a thread, shuffles and switches.

#include <cstdint>

// Called, not inlined: with several arguments, with pointers, from two places.
__device__ __noinline__ float polynomial(float x, const float* coefficients, int degree) {
  float y = 0.0f;
  for (int i = degree; i >= 0; --i) y = fmaf(y, x, coefficients[i]);
  return y;
}

__device__ __noinline__ double mean(double a, double b) { return 0.5 * (a + b); }

__device__ __noinline__ void swap_if(bool greater, int* a, int* b) {
  if (greater != (*a > *b)) return;
  const int old = *a;
  *a = *b;
  *b = old;
}

extern "C" __global__ void polynomials(const float* x, double* out, int n) {
  const float odd[4] = {0.0f, 1.0f, 0.0f, -0.125f}, even[3] = {1.0f, 0.0f, -0.5f};
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const double first = polynomial(x[i], odd, 3);
  out[i] = mean(first, polynomial(x[i], even, 2));
}

// Two arrays of a thread, indexed by what it reads: local memory.
extern "C" __global__ void local_arrays(const int* x, int* out, int n) {
  int counts[16], order[16];
  for (int i = 0; i < 16; ++i) counts[i] = 0, order[i] = 15 - i;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    counts[x[i] & 15] += i;
    swap_if(true, &order[x[i] & 15], &order[i & 15]);
  }
  int sum = 0;
  for (int i = 0; i < 16; ++i) sum = sum * 31 + counts[order[i] & 15];
  out[threadIdx.x] = sum;
}

// Shuffles of every kind, votes, and a sum of a block by way of shared memory.
extern "C" __global__ void block_sum(const float* x, float* out, int* votes, int n) {
  __shared__ float sums[32];
  extern __shared__ float turned[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float value = threadIdx.x < n ? x[threadIdx.x] : 0.0f;
  turned[blockDim.x - 1 - threadIdx.x] = value;
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  const float neighbour = __shfl_down_sync(~0u, value + lane, 1), before = __shfl_up_sync(~0u, lane, 2);
  if (lane == 0) sums[warp] = value;
  __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < blockDim.x / 32; ++i) total += sums[i];
  out[threadIdx.x] = total + neighbour * 0.5f + before + turned[threadIdx.x];
  const unsigned many = __ballot_sync(~0u, threadIdx.x % 3 == 0);
  if (__any_sync(~0u, threadIdx.x == 40)) atomicAdd(votes, __popc(many));
  if (__all_sync(~0u, threadIdx.x >= 32)) atomicMax(votes + 1, (int)threadIdx.x);
  if (lane == 5) atomicOr(votes + 2, 32 >> warp);
}

extern "C" __global__ void cases(const int* x, int* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int y = x[i];
  switch (y % 7) {
    case 0:
      y = y * y + 1;
      break;
    case 1:
      y = __clz(y);
      break;
    case 2:
      y = __brev(y);
      break;
    case 3:
      y = __popc(y) - 5;  // and on
    case 4:
      y ^= 0x5555;
      break;
    case 5:
      y = __funnelshift_l(y, ~y, 7);
      break;
    default:
      y = -y;
  }
  while (y > 1000) y = y % 2 ? y / 3 : y / 2;  // as many steps as a lane needs
  out[i] = y;
}

// Halves, bytes and 64 bits of memory, and a few functions.
extern "C" __global__ void numbers(const float* x, double* out, int8_t* bytes, long long* wide, int n) {
  const int i = threadIdx.x;
  if (i >= n) return;
  out[i] = sqrt((double)x[i]) / 3.0 + floorf(x[i]) * __frcp_rn(x[i]) + rintf(x[i] * 10.0f);
  bytes[i] = (int8_t)(x[i] * 20.0f) + bytes[i];
  wide[i] = wide[i] * 1000003LL / 7 % 1000 + __mul64hi(wide[i], 1LL << 40);
}
