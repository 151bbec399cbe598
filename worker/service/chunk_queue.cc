#include "worker/service/chunk_queue.h"

#include <utility>

#include "common/check.h"
#include "common/limits.h"

namespace walsh::service {
bool ChunkQueue::Push(v1::GenerateStreamResponse message) {
  const auto size_bytes = static_cast<int64_t>(message.ByteSizeLong());
  if (size_bytes_ + size_bytes > limits::kStreamQueueBytesMax) return false;
  size_bytes_ += size_bytes;
  if (message.has_delta() && !messages_.empty() && messages_.back().body.has_delta() &&
      messages_.back().size_bytes + size_bytes <= limits::kStreamMergedBytesMax) {
    Message& last = messages_.back();
    v1::GenerateStreamResponse::Delta& into = *last.body.mutable_delta();
    into.mutable_text()->append(message.delta().text());
    into.mutable_token_ids()->MergeFrom(message.delta().token_ids());
    into.mutable_logprobs()->MergeFrom(message.delta().logprobs());
    last.size_bytes += size_bytes;
    return true;
  }
  messages_.push_back({std::move(message), size_bytes});
  return true;
}

v1::GenerateStreamResponse ChunkQueue::Pop() {
  WALSH_CHECK(!messages_.empty());
  Message message = std::move(messages_.front());
  messages_.pop_front();
  size_bytes_ -= message.size_bytes;
  return std::move(message.body);
}

void ChunkQueue::Clear() {
  messages_.clear();
  size_bytes_ = 0;
}

}  // namespace walsh::service
