#include "tests/testing/test_network.h"

#include <sched.h>
#include <unistd.h>

#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "common/check.h"

namespace walsh::testing {
namespace {

// Where these programs are need not be in the path of a test.
constexpr char kPath[] = "PATH=/usr/sbin:/sbin:/usr/bin:/bin ";

bool Run(const std::string& command) {
  return std::system(absl::StrCat(kPath, "; ", command, " > /dev/null 2>&1").c_str()) == 0;
}

void MustRun(const std::string& command) { WALSH_CHECK(Run(command)); }

}  // namespace

bool TestNetwork::IsPossible() {
  const std::string probe = absl::StrCat("walsh-probe-", getpid());
  return geteuid() == 0 &&
         Run(absl::StrCat("ip netns add ", probe, " && ip netns delete ", probe)) &&
         Run("unshare --net nft add table inet walsh") &&
         Run("unshare --net ip link add near type veth peer name far");
}

TestNetwork::TestNetwork() : far_name_(absl::StrCat("walsh-test-", getpid())) {
  WALSH_CHECK(unshare(CLONE_NEWNET) == 0);
  MustRun("ip link set lo up");
  MustRun(absl::StrCat("ip netns add ", far_name_));
  const std::string far = absl::StrCat("ip -n ", far_name_, " ");
  MustRun(absl::StrCat("ip link add near type veth peer name far netns ", far_name_));
  MustRun(absl::StrCat("ip address add ", kNearHost, "/24 dev near && ip link set near up"));
  MustRun(absl::StrCat(far, "address add ", kFarHost, "/24 dev far && ", far, "link set far up && ",
                       far, "link set lo up"));
  MustRun(
      "nft 'add table inet walsh; "
      "add chain inet walsh from-far { type filter hook input priority 0; }; "
      "add chain inet walsh to-far { type filter hook output priority 0; }'");
}

TestNetwork::~TestNetwork() { MustRun(absl::StrCat("ip netns delete ", far_name_)); }

std::vector<std::string> TestNetwork::far_command() const {
  return {"/usr/bin/env", "ip", "netns", "exec", far_name_};
}

void TestNetwork::Cut(Direction direction, bool is_cut) const {
  const std::string chain = direction == kFromFar ? "from-far" : "to-far";
  const std::string device = direction == kFromFar ? "iifname near" : "oifname near";
  MustRun(is_cut ? absl::StrCat("nft add rule inet walsh ", chain, " ", device, " drop")
                 : absl::StrCat("nft flush chain inet walsh ", chain));
}

}  // namespace walsh::testing
