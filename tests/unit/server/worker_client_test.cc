#include "server/fleet/worker_client.h"

#include <gtest/gtest.h>

#include <memory>

#include "common/grpc_status.h"
#include "tests/testing/status_matchers.h"

namespace walsh::fleet {
namespace {

// A client's own key was good: the coordinator would send it away for what an operator must mend.
TEST(FromWorkerTest, WhatTheCoordinatorIsRefusedIsNotTheClients) {
  for (const grpc::StatusCode code :
       {grpc::StatusCode::UNAUTHENTICATED, grpc::StatusCode::PERMISSION_DENIED}) {
    const absl::Status status = FromWorker({code, "this port is for the service's own daemons"});
    EXPECT_THAT(status, testing::HasCode(absl::StatusCode::kUnavailable));
    EXPECT_EQ(ErrorReason(status), "WORKER_REFUSES");
    EXPECT_TRUE(GaveNoAnswer(status)) << "another worker may be asked";
  }
  EXPECT_TRUE(GaveNoAnswer(FromWorker({grpc::StatusCode::UNAVAILABLE, "connection reset"})));
  EXPECT_FALSE(GaveNoAnswer(FromWorker({grpc::StatusCode::INVALID_ARGUMENT, "no such model"})));
}

TEST(WorkerClientsTest, OneClientForEachAddress) {
  WorkerClients clients([] { return ChannelSecurity(); });
  const auto first = clients.Get({.worker_id = "w1", .address = "127.0.0.1:1"});
  EXPECT_EQ(clients.Get({.worker_id = "w1", .address = "127.0.0.1:1"}), first);
  EXPECT_NE(clients.Get({.worker_id = "w1", .address = "127.0.0.1:2"}), first);
  EXPECT_NE(clients.Get({.worker_id = "w2", .address = "127.0.0.1:1"}), first);
}

// Somebody who had chosen the worker before it left asks for its client afterwards.
TEST(WorkerClientsTest, AClientThatComesBackAfterItsWorkerLeftIsNotKept) {
  WorkerClients clients([] { return ChannelSecurity(); });
  const auto kept = clients.Get({.worker_id = "w1", .address = "127.0.0.1:1"});
  clients.Forget("w2");
  const std::weak_ptr<WorkerClient> late =
      clients.Get({.worker_id = "w2", .address = "127.0.0.1:2"});
  EXPECT_FALSE(late.expired());
  clients.KeepOnly({"w1", "w3"});
  EXPECT_TRUE(late.expired());
  EXPECT_EQ(clients.Get({.worker_id = "w1", .address = "127.0.0.1:1"}), kept);
}

}  // namespace
}  // namespace walsh::fleet
