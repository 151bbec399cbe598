#include <gtest/gtest.h>

#include "client/commands/command.h"
#include "common/endpoints.h"

namespace walsh::client {
namespace {

TEST(WalshCommandTest, SaysAllThatReachesTheSameService) {
  GlobalFlags flags;
  flags.data_dir = DefaultDataDir();
  EXPECT_EQ(WalshCommand(flags), "walsh");
  flags.data_dir = "/my data";
  EXPECT_EQ(WalshCommand(flags), "walsh --data-dir '/my data'");
  flags.server = "host:1";
  flags.security_flags.tls.ca = "the ca.pem";
  flags.security_flags.tls.certificate = "me.pem";
  flags.security_flags.tls.private_key = "me.key";
  flags.security_flags.api_key_file = "key";
  EXPECT_EQ(WalshCommand(flags),
            "walsh --server host:1 --tls-ca 'the ca.pem' --tls-cert me.pem --tls-key me.key "
            "--api-key-file key");
}

}  // namespace
}  // namespace walsh::client
