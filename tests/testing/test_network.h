// A network of a test's own: this process moves into a namespace without any other network, and
// commands run in a second one at the other end of a cable, which can be cut in each direction.
//
//   if (!TestNetwork::IsPossible()) GTEST_SKIP() << TestNetwork::kNeeds;
//   TestNetwork network;  // before the process has threads that use the network
//   … a daemon with network.far_command() before its command line …
//   network.Cut(TestNetwork::kFromFar, true);
#pragma once

#include <string>
#include <vector>

namespace walsh::testing {

class TestNetwork {
 public:
  enum Direction { kFromFar, kToFar };

  static constexpr char kNeeds[] = "needs root, ip and nft";
  static constexpr char kNearHost[] = "10.231.0.1";
  static constexpr char kFarHost[] = "10.231.0.2";
  static bool IsPossible();

  TestNetwork();
  ~TestNetwork();
  TestNetwork(const TestNetwork&) = delete;
  TestNetwork& operator=(const TestNetwork&) = delete;

  // What goes before a command that is to run at the far end.
  std::vector<std::string> far_command() const;
  // Packets of that direction vanish, or do no more.
  void Cut(Direction direction, bool is_cut) const;

 private:
  const std::string far_name_;
};

}  // namespace walsh::testing
