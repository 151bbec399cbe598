#include "worker/pipeline/cuda/artifact_queue.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <new>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/notification.h"
#include "tests/testing/status_matchers.h"

namespace walsh::pipeline::cuda {
namespace {

using ::walsh::testing::HasCode;

// Remembers names; what the queue is given to write with.
class FakeWriter : public ArtifactWriter {
 public:
  absl::Status WriteQuantized(std::string_view, const QuantizedMatrix&) override { return {}; }
  absl::Status WriteOrdered(std::string_view, const OrderedMatrix&) override { return {}; }
  absl::Status WriteDense(std::string_view name, const Matrix&, bool) override {
    names.emplace_back(name);
    return absl::OkStatus();
  }
  absl::Status WritePacked(std::string_view, const PackedTensors&) override { return {}; }
  absl::Status WriteBf16(std::string_view, const Bf16Matrix&, bool) override { return {}; }
  void Record(RecordedTensors*) override {}
  absl::Status WriteRecorded(const RecordedTensors&) override { return {}; }
  absl::StatusOr<ArtifactInfo> Finish(const nlohmann::json&, nlohmann::json, int,
                                      const KeepGoing&) override {
    return ArtifactInfo();
  }
  int64_t bytes_written() const override { return 0; }

  std::vector<std::string> names;
};

ArtifactQueue::Write Named(const std::string& name) {
  return [name](ArtifactWriter& writer) { return writer.WriteDense(name, Matrix(), true); };
}

TEST(ArtifactQueueTest, WritesInOrder) {
  FakeWriter writer;
  ArtifactQueue queue(writer);
  std::vector<std::string> expected;
  for (int i = 0; i < 100; ++i) {
    expected.push_back(std::to_string(i));
    ASSERT_OK(queue.Push(1, Named(expected.back())));
  }
  ASSERT_OK(queue.Finish());
  EXPECT_EQ(writer.names, expected);
}

TEST(ArtifactQueueTest, TheFirstErrorEndsIt) {
  FakeWriter writer;
  ArtifactQueue queue(writer);
  ASSERT_OK(queue.Push(1, [](ArtifactWriter&) { return absl::ResourceExhaustedError("disk"); }));
  EXPECT_THAT(queue.Finish(), HasCode(absl::StatusCode::kResourceExhausted));
  EXPECT_THAT(queue.Push(1, Named("late")), HasCode(absl::StatusCode::kResourceExhausted));
  EXPECT_THAT(queue.Finish(), HasCode(absl::StatusCode::kResourceExhausted));
  EXPECT_TRUE(writer.names.empty());
}

TEST(ArtifactQueueTest, NoMemoryIsAnError) {
  FakeWriter writer;
  ArtifactQueue queue(writer);
  ASSERT_OK(queue.Push(1, [](ArtifactWriter&) -> absl::Status { throw std::bad_alloc(); }));
  EXPECT_THAT(queue.Finish(), HasCode(absl::StatusCode::kResourceExhausted));
}

TEST(ArtifactQueueTest, WaitsWhileTooMuchIsQueued) {
  FakeWriter writer;
  ArtifactQueue queue(writer);
  absl::Notification may_write;
  std::atomic<bool> was_released = false;
  ASSERT_OK(queue.Push(int64_t{2} << 30, [&](ArtifactWriter&) {
    may_write.WaitForNotification();
    was_released = true;
    return absl::OkStatus();
  }));
  std::thread release([&] { may_write.Notify(); });
  ASSERT_OK(queue.Push(1, Named("second")));
  EXPECT_TRUE(was_released);
  release.join();
  ASSERT_OK(queue.Finish());
}

TEST(ArtifactQueueTest, WhatIsLeftIsDroppedWithIt) {
  FakeWriter writer;
  absl::Notification is_writing, may_write;
  {
    auto queue = std::make_unique<ArtifactQueue>(writer);
    ASSERT_OK(queue->Push(1, [&](ArtifactWriter&) {
      is_writing.Notify();
      may_write.WaitForNotification();
      return absl::OkStatus();
    }));
    is_writing.WaitForNotification();
    ASSERT_OK(queue->Push(1, Named("dropped")));
    std::thread destroy([&] { queue.reset(); });
    may_write.Notify();
    destroy.join();
  }
  EXPECT_LE(writer.names.size(), 1);
}

}  // namespace
}  // namespace walsh::pipeline::cuda
