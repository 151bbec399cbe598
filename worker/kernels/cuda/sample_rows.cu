#include <cooperative_groups.h>

#include <cmath>
#include <limits>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "worker/kernels/counter_rng.h"
#include "worker/kernels/cuda/dependent_launch.cuh"
#include "worker/kernels/cuda/reduce.cuh"
#include "worker/kernels/cuda/row_peak.cuh"
#include "worker/kernels/cuda/sample_rows.h"

namespace walsh::kernels::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr unsigned kClusterSize = 8;  // the largest that may be relied on
constexpr int kAtOnce = 4;            // floats of 16 bytes
constexpr int kRunStep = kWarpSize * kAtOnce;
constexpr int64_t kGridYMax = 65535;
static_assert(kWarps == kWarpSize, "one warp reduces what the warps of a CTA have");

// A weight of exp(logit − largest) as an integer, 2^42 for 1: sums do not depend on their order. A
// vocabulary's lowest bits, which are cut off, are together 2^-25 of the largest weight.
using Mass = unsigned long long;
constexpr int kMassBits = 42;
static_assert(kSampleVocabMax <= int64_t{1} << (63 - kMassBits), "the sum of a row fits 63 bits");

constexpr int kFractionBits = 23;  // of a float
constexpr int kExponentOfOne = 127;

// `weight` is from 0 to 1.
__device__ __forceinline__ Mass ToMass(float weight) {
  const unsigned bits = __float_as_uint(weight);
  const Mass digits = (bits & ((1u << kFractionBits) - 1)) | 1u << kFractionBits;
  const int shift = kExponentOfOne - static_cast<int>(bits >> kFractionBits);
  return shift < kMassBits + 1 ? digits << (kMassBits - kFractionBits) >> shift : 0;
}

// Rounded one by one as on the CPU: a compiler that fuses them would give other logits.
__device__ __forceinline__ float Penalized(float logit, int32_t n_output, const SampleRow& row) {
  const auto repetition = static_cast<float>(row.repetition_penalty);
  logit = logit > 0 ? __fdiv_rn(logit, repetition) : __fmul_rn(logit, repetition);
  if (n_output == 0) return logit;
  return __fsub_rn(logit, static_cast<float>(__dadd_rn(
                              row.presence_penalty, __dmul_rn(row.frequency_penalty, n_output))));
}

// exp((logit − largest) · scale)
struct Weight {
  float largest;
  float scale;
  __device__ __forceinline__ Mass operator()(float logit) const {
    return ToMass(expf(__fmul_rn(__fsub_rn(logit, largest), scale)));
  }
};

constexpr int kEveryId = std::numeric_limits<int>::max();

// The logits that are still candidates: those above a key, and of those that have it the ones up to
// an id.
struct Kept {
  unsigned key;
  int last_of_equal;

  static __device__ __forceinline__ Kept From(float floor) {
    return {OrderedBits(floor), floor == -INFINITY ? -1 : kEveryId};
  }
  static __device__ __forceinline__ Kept All() { return {0, 0}; }
  __device__ __forceinline__ bool operator()(float logit, int id) const {
    const unsigned bits = OrderedBits(logit);
    return (bits > key) | ((bits == key) & (id <= last_of_equal));  // without a branch
  }
};

// Where the sum of a measure from the largest logit down reaches what is wanted.
struct Cut {
  bool is_reached = false;  // before the smallest
  unsigned key = 0;
  Mass wanted = 0;  // of the logits with this key
  Mass there = 0;   // what they have
};

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;

struct Shared {
  Mass histogram[kBins];  // of this CTA's logits
  Mass bins[kBins];       // of the row's
  Mass of_warp[kWarps];
  Mass of_cta[2][kClusterSize];
  Cut cut;
  int located;
  float raw_logit;
  float unlisted_logit;
  // In the first CTA: the most probable tokens, in any order.
  unsigned n_top;
  PeakKey top[kTopLogprobsMax];
};

__device__ __forceinline__ Mass InclusiveSum(Mass x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const Mass below = __shfl_up_sync(~0u, x, offset);
    if (lane >= offset) x += below;
  }
  return x;
}

// As atomicAdd, whose 64 bits in shared memory would be a loop.
__device__ __forceinline__ void AddTo(Mass& sum, Mass x) {
  auto* words = reinterpret_cast<unsigned*>(&sum);
  const auto low = static_cast<unsigned>(x);
  const unsigned before = atomicAdd(words, low);
  const unsigned high = static_cast<unsigned>(x >> 32) + (before + low < low ? 1 : 0);
  if (high != 0) atomicAdd(words + 1, high);
}

// The CTAs that share a row. Each has a range of its logits, and each warp a part of that, in the
// order of ids. All threads of all of them call what is not const, and get the same result. What is
// needed in several places is called and not inlined: the whole would not fit the instruction
// cache.
class RowCluster {
 public:
  __device__ RowCluster(Shared& shared, float* logits, int vocab)
      : shared_(shared), cluster_(cooperative_groups::this_cluster()), logits_(logits) {
    constexpr int kCluster = static_cast<int>(kClusterSize);
    const int n_runs = kCluster * kWarps;
    const int n_steps = (vocab + n_runs * kRunStep - 1) / (n_runs * kRunStep);
    const int run = n_steps * kRunStep;
    const int rank = static_cast<int>(cluster_.block_rank());
    first_ = min(rank * kWarps * run, vocab);
    end_ = min((rank + 1) * kWarps * run, vocab);
    run_first_ = min(first_ + Warp() * run, vocab);
    run_end_ = min(run_first_ + run, vocab);
  }

  __device__ void Sync() { cluster_.sync(); }
  __device__ bool IsFirst() const { return cluster_.block_rank() == 0; }
  __device__ bool Has(int id) const { return id >= first_ && id < end_; }
  __device__ float& logit(int id) const { return logits_[id]; }

  // Calls see(logit, id) of this warp's.
  template <typename See>
  __device__ __forceinline__ void ForEach(const See& see) const {
    ForEachFrom(run_first_, see);
  }

  template <typename Op>
  __device__ __noinline__ Mass Reduce(Mass x) {
    x = WarpReduce<Op>(x);
    if (Lane() == 0) shared_.of_warp[Warp()] = x;
    __syncthreads();
    // Two places in turn: whoever still reads one has not come to the barrier of the next.
    turn_ ^= 1;
    if (Warp() == 0) {
      const Mass of_cta = WarpReduce<Op>(shared_.of_warp[Lane()]);
      if (Lane() < static_cast<int>(kClusterSize)) {
        *Of(&shared_.of_cta[turn_][cluster_.block_rank()], static_cast<unsigned>(Lane())) = of_cta;
      }
    }
    Sync();
    Op op;
    Mass result = shared_.of_cta[turn_][0];
#pragma unroll
    for (unsigned c = 1; c < kClusterSize; ++c) result = op(result, shared_.of_cta[turn_][c]);
    return result;
  }

  // The first pass over a row, which is not in the nearest cache yet: loads in flight hide that.
  __device__ __noinline__ PeakKey FindPeak() {
    constexpr int kLoads = 4;
    Peak peak;
    const auto see = [&](float x, int id) { peak.See(x, id); };
    int at = run_first_;
    for (; at + kLoads * kRunStep <= run_end_; at += kLoads * kRunStep) {
      float values[kLoads][kAtOnce];
      const int id = at + Lane() * kAtOnce;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) LoadWhole(id + i * kRunStep, values[i]);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) see(values[i][k], id + i * kRunStep + k);
      }
    }
    ForEachFrom(at, see);
    return Reduce<Max>(peak.Key());
  }

  template <typename Measure>
  __device__ Mass Total(const Measure& measure) {
    Mass sum = 0;
    ForEach([&](float x, int id) { sum += measure(x, id); });
    return Reduce<Sum>(sum);
  }

  // The id at which the sum of `measure` in the order of ids first exceeds target(total), which is
  // below the total.
  template <typename Measure, typename Target>
  __device__ int Locate(const Measure& measure, const Target& target) {
    const Mass wanted = target(Total(measure));
    Mass before = 0;
    for (unsigned c = 0; c < cluster_.block_rank(); ++c) before += shared_.of_cta[turn_][c];
    const Mass of_warp = shared_.of_warp[Lane()];
    const Mass up_to_warp = InclusiveSum(of_warp);
    before += __shfl_sync(~0u, up_to_warp - of_warp, Warp());
    if (before <= wanted && wanted - before < __shfl_sync(~0u, of_warp, Warp())) {
      LocateInRun(measure, wanted - before);
    }
    Sync();
    return shared_.located;
  }

  // measure(logit, id) is a Mass, or a bool to count.
  template <typename Measure>
  __device__ Cut FindCut(Mass wanted, const Measure& measure) {
    unsigned prefix = 0;
    Cut cut;
    for (int top = 32; top > 0; top -= kDigitBits) {
      const int bottom = max(top - kDigitBits, 0);
      MakeBins(measure, prefix, top, bottom);
      cut = CutBins(wanted);
      if (!cut.is_reached) return cut;  // as the first digit shows
      prefix |= cut.key << bottom;
      wanted = cut.wanted;
    }
    cut.key = prefix;
    return cut;
  }

  // Keeps `n` of the `n_there` logits with the cut's key that `kept` has, lowest ids first.
  __device__ __noinline__ Kept KeepEqual(const Kept& kept, unsigned key, Mass n, Mass n_there) {
    if (n >= n_there) {
      return {key, key == kept.key ? kept.last_of_equal : kEveryId};
    }
    const auto is_equal = [&](float x, int id) { return OrderedBits(x) == key && kept(x, id); };
    return {key, Locate(is_equal, [n](Mass) { return n - 1; })};
  }

  // The n largest that `kept` has, or all when there are no more.
  __device__ __noinline__ Kept KeepLargest(const Kept& kept, Mass n) {
    const Cut cut = FindCut(n, kept);
    return cut.is_reached ? KeepEqual(kept, cut.key, cut.wanted, cut.there) : kept;
  }

  // Puts the n most probable into the first CTA's `top`, in any order.
  __device__ void GatherTop(int n) {
    if (threadIdx.x == 0) shared_.n_top = 0;
    Kept kept = KeepLargest(Kept::All(), static_cast<Mass>(n));  // a barrier is in it
    unsigned* n_top = Of(&shared_.n_top, 0);
    PeakKey* top = Of(shared_.top, 0);
    ForEach([&](float x, int id) {
      if (!kept(x, id)) return;
      const unsigned place = atomicAdd(n_top, 1u);
      if (place < kTopLogprobsMax) top[place] = PeakKeyOf(x, static_cast<unsigned>(id));
    });
    Sync();
  }

 private:
  static __device__ int Lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
  static __device__ int Warp() { return static_cast<int>(threadIdx.x) / kWarpSize; }
  // The same place in the shared memory of another CTA.
  template <typename T>
  __device__ T* Of(T* place, unsigned rank) const {
    return cluster_.map_shared_rank(place, rank);
  }

  template <typename See>
  __device__ __forceinline__ void ForEachFrom(int first, const See& see) const {
#pragma unroll 1
    for (int at = first; at < run_end_; at += kRunStep) {
      float values[kAtOnce];
      const int id = Load(at, values);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (id + k < run_end_) see(values[k], id + k);
      }
    }
  }

  __device__ __forceinline__ void LoadWhole(int id, float (&values)[kAtOnce]) const {
    const float4 four = *reinterpret_cast<const float4*>(logits_ + id);
    values[0] = four.x;
    values[1] = four.y;
    values[2] = four.z;
    values[3] = four.w;
  }
  // This lane's of the kRunStep logits at `at`, from the id that is returned on; what is behind the
  // row does not count.
  __device__ __forceinline__ int Load(int at, float (&values)[kAtOnce]) const {
    const int id = at + Lane() * kAtOnce;
    if (id + kAtOnce <= run_end_) {
      LoadWhole(id, values);
    } else {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) values[k] = id + k < run_end_ ? logits_[id + k] : -INFINITY;
    }
    return id;
  }

  template <typename Measure>
  __device__ void LocateInRun(const Measure& measure, Mass wanted) {
    for (int at = run_first_; at < run_end_; at += kRunStep) {
      float values[kAtOnce];
      int id = Load(at, values);
      Mass up_to[kAtOnce];
      Mass sum = 0;
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (id + k < run_end_) sum += measure(values[k], id + k);
        up_to[k] = sum;
      }
      const Mass up_to_lane = InclusiveSum(sum);
      const Mass of_step = __shfl_sync(~0u, up_to_lane, kWarpSize - 1);
      if (of_step <= wanted) {
        wanted -= of_step;
        continue;
      }
      const Mass before = up_to_lane - sum;
      if (before <= wanted && wanted < up_to_lane) {
#pragma unroll
        for (int k = 0; k < kAtOnce - 1; ++k) id += before + up_to[k] <= wanted ? 1 : 0;
        for (unsigned c = 0; c < kClusterSize; ++c) *Of(&shared_.located, c) = id;
      }
      return;
    }
  }

  // bins[digit] = the measure of the row's logits whose key has this digit at bits bottom … top −
  // 1, and above them those of `prefix`.
  template <typename Measure>
  __device__ void MakeBins(const Measure& measure, unsigned prefix, int top, int bottom) {
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) shared_.histogram[i] = 0;
    __syncthreads();
    ForEach([&](float x, int id) {
      const unsigned key = OrderedBits(x);
      if (static_cast<unsigned long long>(key ^ prefix) >> top != 0) return;
      Mass& bin = shared_.histogram[(key ^ prefix) >> bottom];
      if constexpr (std::is_same_v<decltype(measure(x, id)), bool>) {
        if (measure(x, id)) atomicAdd(reinterpret_cast<unsigned*>(&bin), 1u);
      } else {
        const Mass mass = measure(x, id);
        if (mass != 0) AddTo(bin, mass);
      }
    });
    Sync();
    // Each CTA adds up a part of the bins, four lanes to a bin, and gives it to all.
    constexpr int kLanes = 4;
    constexpr unsigned kEach = kClusterSize / kLanes;
    static_assert(kBins * kLanes == kThreads * kClusterSize, "a bin for each four lanes");
    const unsigned bin = (cluster_.block_rank() * kThreads + threadIdx.x) / kLanes;
    const unsigned first = threadIdx.x % kLanes * kEach;
    Mass sum = 0;
#pragma unroll
    for (unsigned c = 0; c < kEach; ++c) sum += *Of(&shared_.histogram[bin], first + c);
#pragma unroll
    for (int offset = 1; offset < kLanes; offset *= 2) sum += __shfl_xor_sync(~0u, sum, offset);
#pragma unroll
    for (unsigned c = 0; c < kEach; ++c) *Of(&shared_.bins[bin], first + c) = sum;
    Sync();
  }

  // The bin in which the sum from the highest bin down reaches `wanted`, as the cut's key.
  __device__ Cut CutBins(Mass wanted) {
    const int high = kBins - 1 - 2 * static_cast<int>(threadIdx.x);
    static_assert(kBins == 2 * kThreads, "two bins a thread");
    const Mass of_high = shared_.bins[high];
    const Mass of_both = of_high + shared_.bins[high - 1];
    const Mass up_to_lane = InclusiveSum(of_both);
    if (Lane() == kWarpSize - 1) shared_.of_warp[Warp()] = up_to_lane;
    __syncthreads();
    const Mass of_warp = shared_.of_warp[Lane()];
    const Mass up_to_warp = InclusiveSum(of_warp);
    const Mass total = __shfl_sync(~0u, up_to_warp, kWarpSize - 1);
    const Mass before = __shfl_sync(~0u, up_to_warp - of_warp, Warp()) + up_to_lane - of_both;
    if (before < wanted && wanted <= before + of_both) {
      const bool is_high = wanted <= before + of_high;
      shared_.cut = {.is_reached = true,
                     .key = static_cast<unsigned>(is_high ? high : high - 1),
                     .wanted = wanted - before - (is_high ? 0 : of_high),
                     .there = is_high ? of_high : of_both - of_high};
    }
    __syncthreads();
    return wanted <= total ? shared_.cut : Cut{};
  }

  Shared& shared_;
  cooperative_groups::cluster_group cluster_;
  float* logits_;
  int first_, end_;          // of this CTA
  int run_first_, run_end_;  // of this warp
  int turn_ = 0;
};

// The smallest set of the most probable that `kept` has whose mass reaches top_p of them all.
__device__ __forceinline__ Kept KeepMass(RowCluster& cluster, const Kept& kept,
                                         const Weight& weight, double top_p, int vocab) {
  const auto mass = [&](float x, int id) { return kept(x, id) ? weight(x) : Mass{0}; };
  const Mass total = cluster.Total(mass);
  const Mass wanted =
      min(max(static_cast<Mass>(ceil(top_p * static_cast<double>(total))), Mass{1}), total);
  // All that are so light weigh no more than what may be missing, so the cut is above them: most of
  // a vocabulary need not be sorted into bins.
  const Mass light = (total - wanted) / static_cast<Mass>(vocab);
  const Cut cut = cluster.FindCut(wanted, [&](float x, int id) {
    const Mass m = mass(x, id);
    return m > light ? m : Mass{0};
  });
  const Mass each = weight(ValueOfOrderedBits(cut.key));
  return cluster.KeepEqual(kept, cut.key, (cut.wanted + each - 1) / each, cut.there / each);
}

__device__ __forceinline__ int Draw(RowCluster& cluster, const SampleRow& row, float largest,
                                    int vocab) {
  // Finite, so that the largest logit keeps its weight of exp(0 · scale) = 1.
  const Weight weight{largest, static_cast<float>(fmin(1.0 / row.temperature, 1e30))};
  // min_p as a bound on logits: p / max p = exp((logit − max) / temperature).
  Kept kept = Kept::From(-INFINITY);
  if (row.min_p > 0) {
    const double below = __dmul_rn(row.temperature, log(row.min_p));
    kept = Kept::From(static_cast<float>(__dadd_rn(largest, below)));
  }
  if (row.top_k > 0 && row.top_k < vocab) {
    kept = cluster.KeepLargest(kept, static_cast<Mass>(row.top_k));
  }
  if (row.top_p < 1) kept = KeepMass(cluster, kept, weight, row.top_p, vocab);
  const double uniform = UniformAt(row.seed, row.position);
  return cluster.Locate(
      [&](float x, int id) { return kept(x, id) ? weight(x) : Mass{0}; },
      [uniform](Mass total) { return __umul64hi(static_cast<Mass>(uniform * 0x1p64), total); });
}

// log softmax of the logits as they came.
class Logprobs {
 public:
  __device__ void Sum(RowCluster& cluster, float largest) {
    largest_ = largest;
    const Weight weight{largest, 1.0f};
    const Mass total = cluster.Total([&](float x, int) { return weight(x); });
    log_of_sum_ = log(static_cast<double>(total)) - kMassBits * M_LN2;
  }
  __device__ float Of(float logit) const {
    return static_cast<float>(static_cast<double>(logit) - largest_ - log_of_sum_);
  }

 private:
  double largest_ = 0;
  double log_of_sum_ = 0;
};

// The first CTA's first warp sorts what GatherTop left.
__device__ __forceinline__ void WriteTop(const Shared& shared, const Logprobs& logprobs, int n,
                                         int32_t* ids, float* values) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= n) return;
  const PeakKey key = shared.top[i];
  int place = 0;
  for (int k = 0; k < n; ++k) place += shared.top[k] > key ? 1 : 0;
  ids[place] = PeakPosition(key);
  values[place] = logprobs.Of(PeakValue(key));
}

// Entry i of a row's seen tokens. What changes is read from the row, as nobody waits until it is
// written.
__device__ __forceinline__ SeenToken SeenAt(const SampleRowsParams& p, const SampleRow& row,
                                            int i) {
  return i == row.changed_seen ? row.changed : p.seen[row.first_seen + i];
}

// Returns the token that is not counted yet where it is this CTA's and not in the list either,
// otherwise −1.
__device__ __forceinline__ int Penalize(const RowCluster& cluster, Shared& shared,
                                        const SampleRowsParams& p, const SampleRow& row) {
  const int uncounted = row.uncounted < 0 ? -1 : p.made[row.uncounted];
  bool is_listed = false;
  for (int i = static_cast<int>(threadIdx.x); i < row.n_seen; i += kThreads) {
    SeenToken seen = SeenAt(p, row, i);
    if (!cluster.Has(seen.token)) continue;
    if (seen.token == uncounted) {
      is_listed = true;
      ++seen.n_output;
    }
    float& logit = cluster.logit(seen.token);
    if (row.n_top_logprobs >= 0) p.seen_logits[row.first_seen + i] = logit;
    logit = Penalized(logit, seen.n_output, row);
  }
  const bool is_in_list = __syncthreads_or(is_listed ? 1 : 0) != 0;
  if (is_in_list || !cluster.Has(uncounted)) return -1;
  if (threadIdx.x == 0) {
    float& logit = cluster.logit(uncounted);
    shared.unlisted_logit = logit;
    logit = Penalized(logit, 1, row);
  }
  __syncthreads();
  return uncounted;
}

__device__ __forceinline__ void Exclude(const RowCluster& cluster, const SampleRowsParams& p,
                                        const SampleRow& row) {
  for (int i = static_cast<int>(threadIdx.x); i < row.n_excluded; i += kThreads) {
    const int32_t token = p.excluded[row.first_excluded + i];
    if (cluster.Has(token)) cluster.logit(token) = -INFINITY;
  }
  __syncthreads();
}

// The logit of a token of this CTA before it was penalized; `unlisted` as Penalize returned it.
__device__ __forceinline__ float RawLogit(const RowCluster& cluster, Shared& shared,
                                          const SampleRowsParams& p, const SampleRow& row,
                                          int unlisted, int token) {
  if (threadIdx.x == 0) {
    shared.raw_logit = token == unlisted ? shared.unlisted_logit : cluster.logit(token);
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < row.n_seen; i += kThreads) {
    if (SeenAt(p, row, i).token == token) {
      shared.raw_logit = p.seen_logits[row.first_seen + i];
    }
  }
  __syncthreads();
  return shared.raw_logit;
}

__global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads)
    SampleRowsKernel(const SampleRowsParams p, int64_t stride) {
  __shared__ Shared shared;
  const auto vocab = static_cast<int>(p.vocab);
  RowCluster cluster(shared, p.logits + blockIdx.y * stride, vocab);
  cluster.Sync();  // the others' shared memory is there from here on
  WaitForPreviousKernel();
  LetNextKernelStart();
  const SampleRow& row = p.rows[blockIdx.y];
  const bool is_writer = cluster.IsFirst() && threadIdx.x == 0;
  if (is_writer && row.changed_seen >= 0) p.seen[row.first_seen + row.changed_seen] = row.changed;

  const PeakKey raw_peak = cluster.FindPeak();
  if (PeakPosition(raw_peak) < 0 || isinf(PeakValue(raw_peak))) {
    if (is_writer) p.ids[blockIdx.y] = kNotFinite;
    return;
  }
  const int n_top = min(row.n_top_logprobs, min(kTopLogprobsMax, vocab));
  Logprobs logprobs;
  if (n_top >= 0) logprobs.Sum(cluster, PeakValue(raw_peak));
  if (n_top > 0) {
    cluster.GatherTop(n_top);
    if (cluster.IsFirst()) {
      const int64_t at = static_cast<int64_t>(blockIdx.y) * kTopLogprobsMax;
      WriteTop(shared, logprobs, n_top, p.top_ids + at, p.top_logprobs + at);
    }
  }

  PeakKey peak = raw_peak;
  int unlisted = -1;
  if (row.n_seen > 0 || row.uncounted >= 0 || row.n_excluded > 0) {
    unlisted = Penalize(cluster, shared, p, row);
    Exclude(cluster, p, row);
    peak = cluster.FindPeak();
  }
  int token = PeakPosition(peak);
  if (token < 0) {
    if (is_writer) p.ids[blockIdx.y] = kNoTokenLeft;
    return;
  }
  // A penalty may have made the largest infinite: no other has a share beside it.
  if (row.temperature > 0 && !isinf(PeakValue(peak))) {
    token = Draw(cluster, row, PeakValue(peak), vocab);
  }
  if (is_writer) p.ids[blockIdx.y] = token;
  if (n_top >= 0 && cluster.Has(token)) {
    const float logit = RawLogit(cluster, shared, p, row, unlisted, token);
    if (threadIdx.x == 0) p.logprobs[blockIdx.y] = logprobs.Of(logit);
  }
}

}  // namespace

absl::Status SampleRows(const SampleRowsParams& p) {
  if (p.n_rows < 0 || p.n_rows > kGridYMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("SampleRows: ", p.n_rows, " rows, the limit is ", kGridYMax));
  }
  if (p.vocab <= 0 || p.vocab > kSampleVocabMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("SampleRows: a vocabulary of ", p.vocab, ", the limit is ", kSampleVocabMax));
  }
  const int64_t stride = p.stride == 0 ? p.vocab : p.stride;
  if (stride < p.vocab || (stride % kAtOnce != 0 && p.n_rows > 1) ||
      reinterpret_cast<uintptr_t>(p.logits) % (kAtOnce * sizeof(float)) != 0) {
    return absl::InvalidArgumentError(absl::StrCat("SampleRows: rows of ", p.vocab, " logits, ",
                                                   stride,
                                                   " apart, must begin at multiples of 16 bytes"));
  }
  if (p.n_rows == 0) return absl::OkStatus();
  return LaunchKernel("SampleRows", SampleRowsKernel,
                      {.grid = dim3(kClusterSize, static_cast<unsigned>(p.n_rows)),
                       .threads = kThreads,
                       .overlap_previous = p.overlap_previous,
                       .stream = p.stream},
                      p, stride);
}

}  // namespace walsh::kernels::cuda
