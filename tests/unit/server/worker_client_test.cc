#include "server/fleet/worker_client.h"

#include <gtest/gtest.h>

#include <memory>

namespace walsh::fleet {
namespace {

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
