// Layout attention: parameters and entry points, shared by every device. The maths is in dense_attn/reference/.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/host_device.h"
#include "common/tensor_view.h"

enum class Modulation { kRange, kMax, kBias, kMask };
constexpr const char* kModulations[] = {"range", "max", "bias", "mask"};  // their names, in this order

constexpr int64_t kMaxHeadDim = 256;

struct LayoutAttentionParams {
  DType dtype;
  Modulation modulation;
  double scale;
  int64_t batch, num_heads, seqlen_q, seqlen_k, head_dim;
  int64_t group;            // heads of q that meet one head of k and v, of which there are num_heads / group
  TensorView<4> q, k, v;    // [B, H, M|N, D], last axis contiguous
  TensorView<2> q_regions;  // int32 [B, M]
  TensorView<2> k_regions;  // int32 [B, N]
  TensorView<2> q_order;    // int32 [B, M] or no data: the order in which query rows are visited
  TensorView<2> k_order;    // int32 [B, N] or no data: the order in which kernels that work by tiles visit the keys
  TensorView<1> seqlens_k;  // int32 [B] or no data: how many keys of a sample are there, the first ones
  TensorView<3> strength;   // [B, H, M] or no data, float or, with double inputs, double; so are the statistics
  double every_strength;    // that of all rows, where strength has no data
  TensorView<4> out;        // [B, H, M, D]
  TensorView<3> lse;        // [B, H, M] or no data
  TensorView<4> stats;      // [B, H, M, kStats], contiguous, or no data: what the backward pass needs of each row
};

// Largest and smallest <q, k>; the softmax's maximum in log2 units and its sum, both without the terms common to the
// row.
enum Stats { kRawMax, kRawMin, kShift, kSum, kStats };

struct LayoutAttentionBwdParams : LayoutAttentionParams {
  TensorView<4> grad_out;    // [B, H, M, D], last axis contiguous
  TensorView<3> grad_lse;    // [B, H, M] or no data
  TensorView<4> dq, dk, dv;  // like q, k, v
  TensorView<3> dstrength;   // [B, H, M]
  int64_t parts;             // query ranges of one head of keys that are worked on at once, with dk and dv of their own
  void* partials;  // [B * H / group, parts, 2, N, padded D] when parts > 1; on a GPU the scratch of its kernels
};

// The keys of a sample that are there, whatever the count says.
HOST_DEVICE int64_t keys_of(const LayoutAttentionParams& p, int64_t batch) {
  if (p.seqlens_k.data == nullptr) return p.seqlen_k;
  const int64_t count = *p.seqlens_k.at<const int32_t>(batch);
  return count < 0 ? 0 : count < p.seqlen_k ? count : p.seqlen_k;
}

// CPU: work is a range of items, any of which may run on any thread with that thread's scratch.
struct LayoutAttentionCpu {
  int64_t (*fwd_items)(const LayoutAttentionParams&);
  size_t (*fwd_scratch_bytes)(const LayoutAttentionParams&);
  void (*fwd)(const LayoutAttentionParams&, int64_t begin, int64_t end, void* scratch);
  int64_t (*bwd_items)(const LayoutAttentionBwdParams&);
  size_t (*bwd_scratch_bytes)(const LayoutAttentionBwdParams&);
  size_t (*bwd_partial_bytes)(const LayoutAttentionBwdParams&);
  void (*bwd)(const LayoutAttentionBwdParams&, int64_t begin, int64_t end, void* scratch);
  void (*bwd_reduce)(const LayoutAttentionBwdParams&, int64_t begin,
                     int64_t end);  // items: heads of keys, when parts > 1
};
