#include "worker/kernels/cuda/read_ahead.h"

#include <utility>

#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/wait_timer.h"

namespace walsh::kernels::cuda {

absl::StatusOr<std::unique_ptr<ReadAhead>> ReadAhead::Create(Context* context, PinnedPool* pinned,
                                                             int64_t n_pieces, int64_t piece_bytes,
                                                             Fill fill) {
  std::unique_ptr<ReadAhead> ahead(new ReadAhead(context, n_pieces, std::move(fill)));
  const cudaStream_t stream = context->stream();
  for (Slot& slot : ahead->slots_) {
    WALSH_ASSIGN_OR_RETURN(slot.host, pinned->Take(piece_bytes));
    WALSH_ASSIGN_OR_RETURN(slot.device, DeviceBuffer<std::byte>::Allocate(piece_bytes, stream));
    // The memory is there, and whoever had it before has done with it, in the order of `stream`.
    WALSH_RETURN_IF_ERROR(slot.consumed.Record(stream));
  }
  return ahead;
}

ReadAhead::~ReadAhead() {
  if (reading_.valid()) reading_.wait();
  // A device that fails here fails the next call, too, which says so.
  for (const Slot& slot : slots_) slot.arrived.Wait().IgnoreError();
}

absl::StatusOr<const std::byte*> ReadAhead::Take(int64_t index) {
  if (taken_ != nullptr) WALSH_RETURN_IF_ERROR(taken_->consumed.Record(context_.stream()));
  taken_ = nullptr;
  WALSH_RETURN_IF_ERROR(Await(index));
  if (index + 1 < n_pieces_) {
    reading_ = std::async(std::launch::async, [this, next = index + 1]() -> absl::Status {
      WALSH_RETURN_IF_ERROR(context_.MakeCurrent());
      return Read(next);
    });
  }
  Slot& slot = SlotOf(index);
  WALSH_RETURN_IF_ERROR(slot.arrived.Hold(context_.stream()));
  taken_ = &slot;
  return slot.device.data();
}

absl::Status ReadAhead::Await(int64_t index) {
  const WaitTimer timer(&seconds_waited_);
  if (reading_.valid()) WALSH_RETURN_IF_ERROR(reading_.get());
  return SlotOf(index).index == index ? absl::OkStatus() : Read(index);
}

absl::Status ReadAhead::Read(int64_t index) {
  Slot& slot = SlotOf(index);
  slot.index = -1;
  // The copy before has read the pinned memory, and the work before it the device's.
  WALSH_RETURN_IF_ERROR(slot.arrived.Wait());
  WALSH_ASSIGN_OR_RETURN(const int64_t n_bytes, fill_(index, slot.host.span()));
  WALSH_RETURN_IF_ERROR(slot.consumed.Hold(context_.copies()));
  WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(slot.device.data(), slot.host.span().data(),
                                             static_cast<size_t>(n_bytes), cudaMemcpyHostToDevice,
                                             context_.copies()));
  WALSH_RETURN_IF_ERROR(slot.arrived.Record(context_.copies()));
  slot.index = index;
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cuda
