#include "worker/io/model_root.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <iterator>
#include <string>
#include <thread>

#include "tests/testing/checkpoint_bytes.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"

namespace walsh {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using walsh::testing::HasCode;
using walsh::testing::StatusIs;
using walsh::testing::TempDir;
using walsh::testing::WriteFile;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;

class ModelRootsTest : public ::testing::Test {
 protected:
  ModelRootsTest() {
    fs::create_directories(dir_ / "root/model");
    fs::create_directories(dir_ / "second/other");
    fs::create_directories(dir_ / "outside/secret");
    fs::create_directories(dir_ / "root-like");
    WriteFile(dir_ / "root/model/config.json", "{}");
    WriteFile(dir_ / "root/text.txt", "text");
    WriteFile(dir_ / "outside/secret/key", "key");
  }
  ModelRoots Roots() { return *ModelRoots::Create({dir_ / "root", dir_ / "second"}); }

  TempDir dir_;
};

TEST_F(ModelRootsTest, ResolvesBeneathItsRoots) {
  const ModelRoots roots = Roots();
  const std::string root = fs::canonical(dir_ / "root");
  EXPECT_EQ(roots.Resolve("model").value_or("?"), root + "/model");
  EXPECT_EQ(roots.Resolve("./model/../text.txt").value_or("?"), root + "/text.txt");
  EXPECT_EQ(roots.Resolve(root + "/model/").value_or("?"), root + "/model");
  EXPECT_EQ(roots.Resolve("other").value_or("?"),
            fs::canonical(dir_ / "second").string() + "/other");
  EXPECT_EQ(roots.Resolve(".").value_or("?"), root);
}

TEST_F(ModelRootsTest, RefusesWhatLiesOutside) {
  const ModelRoots roots = Roots();
  for (const std::string& reference :
       {std::string("../outside/secret"), std::string("/etc/passwd"), std::string("/"),
        std::string("model/../../outside/secret/key"), dir_ / "outside/secret", dir_ / "root-like",
        dir_ / "root/../root-like"}) {
    EXPECT_THAT(roots.Resolve(reference),
                StatusIs(kInvalid, HasSubstr("'" + reference + "' lies outside")));
  }
  // The answer does not tell whether something exists there.
  EXPECT_THAT(roots.Resolve("/no/such/file"), HasCode(kInvalid));
  EXPECT_THAT(roots.Resolve("../outside/nothing"), HasCode(kInvalid));
}

TEST_F(ModelRootsTest, FollowsLinksAndChecksWhereTheyLead) {
  const ModelRoots roots = Roots();
  fs::create_symlink(dir_ / "outside/secret", dir_ / "root/escape");
  fs::create_symlink(dir_ / "second/other", dir_ / "root/across");
  fs::create_symlink("/proc/self", dir_ / "root/magic");
  EXPECT_THAT(roots.Resolve("escape"), HasCode(kInvalid));
  EXPECT_THAT(roots.Resolve("escape/key"), HasCode(kInvalid));
  EXPECT_THAT(roots.Resolve("magic/root/etc/passwd"), HasCode(kInvalid));
  EXPECT_EQ(roots.Resolve("across").value_or("?"),
            fs::canonical(dir_ / "second").string() + "/other");
}

// As the Hugging Face cache is: snapshots of links to files beside them.
TEST_F(ModelRootsTest, FollowsRelativeLinksThatStay) {
  const ModelRoots roots = Roots();
  fs::create_directories(dir_ / "root/models--a/blobs");
  fs::create_directories(dir_ / "root/models--a/snapshots/1");
  WriteFile(dir_ / "root/models--a/blobs/2", "{}");
  fs::create_symlink("../../blobs/2", dir_ / "root/models--a/snapshots/1/config.json");
  fs::create_symlink("snapshots/1", dir_ / "root/models--a/main");
  const std::string snapshot = fs::canonical(dir_ / "root/models--a/snapshots/1");
  EXPECT_EQ(roots.Resolve("models--a/snapshots/1").value_or("?"), snapshot);
  EXPECT_EQ(roots.Resolve("models--a/main").value_or("?"), snapshot);
  EXPECT_EQ(roots.Resolve("models--a/main/config.json").value_or("?"),
            fs::canonical(dir_ / "root/models--a/blobs/2"));
}

TEST_F(ModelRootsTest, RefusesRelativeLinksThatLeave) {
  const ModelRoots roots = Roots();
  fs::create_symlink("../outside/secret", dir_ / "root/escape");
  fs::create_symlink("../../outside/secret/key", dir_ / "root/model/key");
  fs::create_symlink("itself", dir_ / "root/itself");
  for (const char* path : {"escape", "escape/key", "model", "model/key", "itself"}) {
    EXPECT_THAT(roots.Resolve(path), StatusIs(kInvalid, HasSubstr("lies outside"))) << path;
  }
}

// Of /proc, links that no path has: to open files, and to the roots of processes.
TEST_F(ModelRootsTest, RefusesWhatPassesThroughMagicLinks) {
  const std::string root = fs::canonical(dir_ / "root");
  for (const ModelRoots& roots : {Roots(), *ModelRoots::Create({"/"})}) {
    for (const char* prefix : {"/proc/self/root", "/proc/thread-self/root"}) {
      EXPECT_THAT(roots.Resolve(prefix + root + "/model"), HasCode(kInvalid)) << prefix;
    }
    EXPECT_THAT(roots.Resolve("/proc/self/cwd"), HasCode(kInvalid));
  }
}

// Lets openat2 fail as an old kernel does, for what else the calling thread does.
void ForgetOpenat2() {
  sock_filter code[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_openat2, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program = {.len = std::size(code), .filter = code};
  ASSERT_EQ(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
  ASSERT_EQ(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), 0);
}

TEST_F(ModelRootsTest, OldKernelsResolveTheSame) {
  const ModelRoots roots = Roots();
  fs::create_symlink("../text.txt", dir_ / "root/model/stays");
  fs::create_symlink(dir_ / "outside/secret", dir_ / "root/escape");
  std::thread([&] {
    ForgetOpenat2();
    EXPECT_EQ(roots.Resolve("model/stays").value_or("?"), fs::canonical(dir_ / "root/text.txt"));
    EXPECT_OK(roots.Resolve("model"));
    EXPECT_THAT(roots.Resolve("escape/key"), HasCode(kInvalid));
    EXPECT_THAT(roots.Resolve("../outside/secret"), HasCode(kInvalid));
    EXPECT_THAT(roots.Resolve("absent"), HasCode(absl::StatusCode::kNotFound));
  }).join();
}

TEST_F(ModelRootsTest, RefusesADirectoryWhoseEntriesLeadOut) {
  const ModelRoots roots = Roots();
  fs::create_symlink(dir_ / "outside/secret/key", dir_ / "root/model/model.safetensors");
  EXPECT_THAT(roots.Resolve("model"),
              StatusIs(kInvalid, HasSubstr("'model/model.safetensors' lies outside")));
}

// A folder that is taken out of a root, by path and through a link, though it came after the start.
TEST_F(ModelRootsTest, RefusesExcludedFolders) {
  const auto roots = ModelRoots::Create({dir_ / "root"}, {dir_ / "root/rejected"});
  ASSERT_OK(roots);
  EXPECT_THAT(roots->Resolve("rejected/job"), HasCode(kInvalid))
      << "nothing is told of what is not";
  fs::create_directories(dir_ / "root/rejected/job");
  fs::create_directories(dir_ / "root/rejected-not");
  fs::create_symlink(dir_ / "root/rejected/job", dir_ / "root/link");
  for (const char* path : {"rejected", "rejected/job", "link", "model/../rejected/job"}) {
    EXPECT_THAT(roots->Resolve(path), StatusIs(kInvalid, HasSubstr("lies outside"))) << path;
  }
  EXPECT_THAT(roots->Resolve(dir_ / "root/rejected/job"), HasCode(kInvalid));
  EXPECT_OK(roots->Resolve("rejected-not"));
  // Who names it as a root wants it.
  const auto named =
      ModelRoots::Create({dir_ / "root", dir_ / "root/rejected"}, {dir_ / "root/rejected"});
  ASSERT_OK(named);
  EXPECT_OK(named->Resolve(dir_ / "root/rejected/job"));
}

TEST_F(ModelRootsTest, NamesOnlyTheReference) {
  const auto missing = Roots().Resolve("absent/model");
  EXPECT_THAT(missing, StatusIs(absl::StatusCode::kNotFound,
                                AllOf(HasSubstr("'absent/model' does not exist"),
                                      Not(HasSubstr(dir_.path())))));
}

TEST_F(ModelRootsTest, RefusesOddSpellings) {
  const ModelRoots roots = Roots();
  EXPECT_THAT(roots.Resolve(""), StatusIs(kInvalid, HasSubstr("empty")));
  EXPECT_THAT(roots.Resolve(std::string("model\0x", 7)), HasCode(kInvalid));
  EXPECT_THAT(roots.Resolve("model\n"), HasCode(kInvalid));
  EXPECT_THAT(roots.Resolve("\xc0\xae\xc0\xae/outside"), HasCode(kInvalid));
  EXPECT_THAT(roots.Resolve(std::string(5000, 'a')), StatusIs(kInvalid, HasSubstr("at most 4096")));
  for (const char* url :
       {"http://a/b", "HTTPS://a", "s3://a", "file:///etc/passwd", "file:model"}) {
    EXPECT_THAT(roots.Resolve(url), StatusIs(kInvalid, HasSubstr("is a URL"))) << url;
  }
  EXPECT_THAT(roots.Resolve("a:b"), HasCode(absl::StatusCode::kNotFound)) << "a name like others";
  EXPECT_THAT(roots.Resolve("%2e%2e/outside"), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(roots.Resolve("MODEL"), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(roots.Resolve("model."), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(roots.Resolve("model/..."), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(roots.Resolve(std::string(300, 'a')), HasCode(absl::StatusCode::kNotFound));
}

TEST_F(ModelRootsTest, NeedsDirectories) {
  EXPECT_THAT(ModelRoots::Create({dir_ / "absent"}), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(ModelRoots::Create({dir_ / "root/text.txt"}), HasCode(absl::StatusCode::kNotFound));
}

}  // namespace
}  // namespace walsh
