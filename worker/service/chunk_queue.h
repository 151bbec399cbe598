// Messages of one stream between the engine, which never waits, and a reader, who may.
//
// While a message is being written, the deltas that follow are merged into one, so that a reader
// who keeps up gets each token at once and one who does not gets fewer, larger messages (up to
// limits::kStreamMergedBytesMax). The queue holds at most limits::kStreamQueueBytesMax; a reader
// who falls behind further loses the stream.
//
// Threads: none; the caller locks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>

#include "walsh/v1/generation.pb.h"

namespace walsh::service {

class ChunkQueue {
 public:
  // False when there is no room: the message is dropped and the stream should end.
  bool Push(v1::GenerateStreamResponse message);
  bool empty() const { return messages_.empty(); }
  size_t size() const { return messages_.size(); }
  // The oldest message; the queue must not be empty.
  v1::GenerateStreamResponse Pop();
  void Clear();

 private:
  struct Message {
    v1::GenerateStreamResponse body;
    int64_t size_bytes = 0;
  };
  std::deque<Message> messages_;
  int64_t size_bytes_ = 0;
};

}  // namespace walsh::service
