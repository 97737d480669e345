// The classes of head dims. A kernel that needs one as a constant is compiled once a class, in a namespace of its name,
// and takes head dims that are multiples of kHeadDimStep up to it.
#pragma once

#include <cstdint>

// bindings/cuda/build.py reads the classes here; tests build some of them alone.
#ifndef DENSE_ATTN_HEAD_DIMS
#define DENSE_ATTN_HEAD_DIMS(f) f(40) f(64) f(80) f(96) f(128) f(160) f(256)
#endif

constexpr int64_t kHeadDimStep = 8;  // 16 bytes

#define DENSE_ATTN_NAME_CLASS(head_dim) head_dim_##head_dim
#define DENSE_ATTN_CLASS_OF(head_dim) DENSE_ATTN_NAME_CLASS(head_dim)
#define DENSE_ATTN_CLASS DENSE_ATTN_CLASS_OF(DENSE_ATTN_HEAD_DIM)
