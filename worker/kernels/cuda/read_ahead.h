// What is stored in pieces, on its way to the device: while the device works on one piece, a thread
// reads the next into pinned memory and copies it over.
//
// Errors:  those of `fill`; RESOURCE_EXHAUSTED; the device's
// Memory:  two pieces on the device and two in pinned memory
// Threads: used by one thread; `fill` runs on that or on another one, never on both
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/kernels/cuda/context.h"
#include "worker/kernels/cuda/device_buffer.h"
#include "worker/kernels/cuda/event.h"
#include "worker/kernels/cuda/pinned_pool.h"

namespace walsh::kernels::cuda {

// Whole tensors travel in pieces of this size: long enough for a copy at full speed, short enough
// that pinning two of them takes no time.
inline constexpr int64_t kPieceBytes = int64_t{32} << 20;

// Tensors that lie behind each other start where vectorized loads may.
inline constexpr int64_t kTensorAlignment = 256;
inline int64_t TensorRoom(int64_t n_bytes) {
  return (n_bytes + kTensorAlignment - 1) / kTensorAlignment * kTensorAlignment;
}

class ReadAhead {
 public:
  static constexpr int kSlots = 2;  // pieces that are there at once

  // Reads piece `index` into the beginning of `host` and returns its bytes.
  using Fill = std::function<absl::StatusOr<int64_t>(int64_t index, std::span<std::byte> host)>;

  // All outlive the object. A piece has at most `piece_bytes`.
  static absl::StatusOr<std::unique_ptr<ReadAhead>> Create(Context* context, PinnedPool* pinned,
                                                           int64_t n_pieces, int64_t piece_bytes,
                                                           Fill fill);
  ~ReadAhead();
  ReadAhead(const ReadAhead&) = delete;
  ReadAhead& operator=(const ReadAhead&) = delete;

  // The piece on the device, for work that is queued on the context's stream before the next Take.
  // The piece after it is read meanwhile; any order works.
  absl::StatusOr<const std::byte*> Take(int64_t index);

  // That Take has waited for reading so far.
  double seconds_waited() const { return seconds_waited_; }

 private:
  struct Slot {
    PinnedPool::Lease host;
    DeviceBuffer<std::byte> device;
    Event arrived;   // of the copy
    Event consumed;  // of the work that reads the device's form
    int64_t index = -1;
  };

  ReadAhead(Context* context, int64_t n_pieces, Fill fill)
      : context_(*context), n_pieces_(n_pieces), fill_(std::move(fill)) {}
  Slot& SlotOf(int64_t index) { return slots_[static_cast<size_t>(index % kSlots)]; }
  absl::Status Read(int64_t index);
  absl::Status Await(int64_t index);

  Context& context_;
  const int64_t n_pieces_;
  const Fill fill_;
  std::array<Slot, kSlots> slots_;
  Slot* taken_ = nullptr;
  std::future<absl::Status> reading_;
  double seconds_waited_ = 0;
};

}  // namespace walsh::kernels::cuda
