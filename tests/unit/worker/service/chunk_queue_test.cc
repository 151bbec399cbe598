#include "worker/service/chunk_queue.h"

#include <gtest/gtest.h>

#include <string>

namespace walsh::service {
namespace {

v1::GenerateStreamResponse Delta(const std::string& text) {
  v1::GenerateStreamResponse message;
  message.mutable_delta()->set_text(text);
  message.mutable_delta()->add_token_ids(static_cast<int32_t>(text.size()));
  return message;
}

v1::GenerateStreamResponse Finished() {
  v1::GenerateStreamResponse message;
  message.mutable_finished()->set_finish_reason(v1::EOS);
  return message;
}

TEST(ChunkQueueTest, WaitingDeltasBecomeOne) {
  ChunkQueue queue;
  v1::GenerateStreamResponse started;
  started.mutable_started()->set_prompt_tokens(3);
  EXPECT_TRUE(queue.Push(started));
  EXPECT_TRUE(queue.Push(Delta("a")));
  EXPECT_TRUE(queue.Push(Delta("bc")));
  EXPECT_TRUE(queue.Push(Finished()));
  EXPECT_EQ(queue.size(), 3u);
  EXPECT_TRUE(queue.Pop().has_started());
  const v1::GenerateStreamResponse merged = queue.Pop();
  EXPECT_EQ(merged.delta().text(), "abc");
  EXPECT_EQ(merged.delta().token_ids_size(), 2);
  EXPECT_TRUE(queue.Pop().has_finished());
  EXPECT_TRUE(queue.empty());
}

TEST(ChunkQueueTest, IsBoundedInBytes) {
  ChunkQueue queue;
  const std::string kib(1024, 'x');
  int n_taken = 0;
  while (queue.Push(Delta(kib))) ++n_taken;
  EXPECT_GT(n_taken, 900);
  EXPECT_LT(n_taken, 1024);
  EXPECT_LT(queue.size(), 50u);
  int n_bytes = 0;
  while (!queue.empty()) n_bytes += static_cast<int>(queue.Pop().delta().text().size());
  EXPECT_EQ(n_bytes, n_taken * 1024);
  EXPECT_TRUE(queue.Push(Delta(kib)));
}

}  // namespace
}  // namespace walsh::service
