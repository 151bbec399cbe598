// Publishing under faults. fsync and rename are replaced in this executable by recorders that can
// fail, so that the order of the steps, and what is left after each failing step, are seen without
// a power cut. A full and a read-only file system are real: a tmpfs in a mount namespace.
#include "common/publish.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"

namespace {

struct Recorder {
  bool is_on = false;
  int fail_at = -1;  // index of the step that fails
  int error = EIO;
  std::vector<std::string> steps;

  // True when the step is to fail.
  bool Step(const std::string& what) {
    if (!is_on) return false;
    steps.push_back(what);
    if (static_cast<int>(steps.size()) - 1 != fail_at) return false;
    errno = error;
    return true;
  }
};
Recorder recorder;

std::string NameOf(const std::string& path) {
  const std::string name = std::filesystem::path(path).filename().string();
  return name.find(".tmp-") != std::string::npos ? "temporary" : name;
}

}  // namespace

extern "C" int fsync(int fd) {
  char path[4096] = {};
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  const ssize_t n = readlink(link.c_str(), path, sizeof path - 1);
  if (recorder.Step("fsync " + NameOf(n < 0 ? "" : path))) return -1;
  return static_cast<int>(syscall(SYS_fsync, fd));
}

extern "C" int rename(const char* from, const char* to) noexcept {
  if (recorder.Step("rename " + NameOf(from) + " " + NameOf(to))) return -1;
  return static_cast<int>(syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0));
}

extern "C" int renameat2(int from_fd, const char* from, int to_fd, const char* to,
                         unsigned flags) noexcept {
  if (recorder.Step("rename " + NameOf(from) + " " + NameOf(to))) return -1;
  return static_cast<int>(syscall(SYS_renameat2, from_fd, from, to_fd, to, flags));
}

namespace walsh {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;
using ::walsh::testing::TempDir;

class PublishTest : public ::testing::Test {
 protected:
  void SetUp() override { recorder = {}; }
  void TearDown() override { recorder = {}; }

  std::string Read(const std::string& path) { return ReadFile(path, 1 << 20).value_or("<none>"); }
  std::vector<std::string> List(const std::string& path) {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(path)) {
      names.push_back(entry.path().filename().string());
    }
    std::sort(names.begin(), names.end());
    return names;
  }
  std::string Name(const TempDir& dir) {
    return std::filesystem::path(dir.path()).filename().string();
  }

  TempDir dir_;
};

TEST_F(PublishTest, AFileIsSyncedRenamedAndItsDirectorySynced) {
  recorder.is_on = true;
  ASSERT_OK(PublishFile(dir_ / "f", "text"));
  EXPECT_THAT(recorder.steps,
              ElementsAre("fsync temporary", "rename temporary f", "fsync " + Name(dir_)));
  EXPECT_EQ(Read(dir_ / "f"), "text");
  EXPECT_THAT(List(dir_.path()), ElementsAre("f"));
}

TEST_F(PublishTest, AFailureBeforeTheRenameLeavesTheOldFile) {
  ASSERT_OK(PublishFile(dir_ / "f", "old"));
  for (const int step : {0, 1}) {
    recorder = {.is_on = true, .fail_at = step};
    EXPECT_THAT(PublishFile(dir_ / "f", "new"), HasCode(absl::StatusCode::kInternal));
    EXPECT_EQ(recorder.steps.size(), static_cast<size_t>(step) + 1);  // never synced again
    EXPECT_EQ(Read(dir_ / "f"), "old");
    EXPECT_THAT(List(dir_.path()), ElementsAre("f"));
  }
  recorder = {.is_on = true, .fail_at = 2};
  EXPECT_THAT(PublishFile(dir_ / "f", "new"), HasCode(absl::StatusCode::kInternal));
  EXPECT_EQ(Read(dir_ / "f"), "new");  // whole, though its durability is unknown
}

TEST_F(PublishTest, AReplacedFileIsRenamedAndItsDirectorySynced) {
  ASSERT_OK(PublishFile(dir_ / "f", "old"));
  ASSERT_OK(PublishFile(dir_ / "written", "new"));
  recorder = {.is_on = true};
  ASSERT_OK(ReplaceFile(dir_ / "written", dir_ / "f"));
  EXPECT_THAT(recorder.steps, ElementsAre("rename written f", "fsync " + Name(dir_)));
  EXPECT_EQ(Read(dir_ / "f"), "new");
  EXPECT_THAT(ReplaceFile(dir_ / "written", dir_ / "f"), HasCode(absl::StatusCode::kNotFound));
}

TEST_F(PublishTest, ConcurrentWritersLeaveOneWholeFile) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([this, i] {
      for (int k = 0; k < 10; ++k) {
        EXPECT_OK(PublishFile(dir_ / "f", std::string(10'000, static_cast<char>('a' + i))));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const std::string text = Read(dir_ / "f");
  EXPECT_EQ(text.size(), 10'000u);
  EXPECT_EQ(text, std::string(10'000, text[0]));
  EXPECT_THAT(List(dir_.path()), ElementsAre("f"));
}

TEST_F(PublishTest, ADirectoryIsSyncedFromInsideOut) {
  ASSERT_OK(MakeDirectories(dir_ / "tmp/sub"));
  std::ofstream(dir_ / "tmp/sub/weights") << "w";
  recorder.is_on = true;
  ASSERT_OK(PublishDirectory(dir_ / "tmp", dir_ / "model"));
  ASSERT_EQ(recorder.steps.size(), 5u);
  EXPECT_EQ(recorder.steps[2], "fsync tmp");
  EXPECT_EQ(recorder.steps[3], "rename tmp model");
  EXPECT_EQ(recorder.steps[4], "fsync " + Name(dir_));
  EXPECT_THAT((std::vector<std::string>{recorder.steps[0], recorder.steps[1]}),
              ::testing::UnorderedElementsAre("fsync sub", "fsync weights"));
  EXPECT_EQ(Read(dir_ / "model/sub/weights"), "w");
}

TEST_F(PublishTest, NoStepOfADirectoryMayFailUnseen) {
  ASSERT_OK(MakeDirectories(dir_ / "tmp/sub"));
  std::ofstream(dir_ / "tmp/sub/weights") << "w";
  for (int step = 0; step < 4; ++step) {
    recorder = {.is_on = true, .fail_at = step};
    EXPECT_THAT(PublishDirectory(dir_ / "tmp", dir_ / "model"),
                HasCode(absl::StatusCode::kInternal));
    EXPECT_THAT(List(dir_.path()), ElementsAre("tmp")) << step;
  }
}

TEST_F(PublishTest, AnExistingDirectoryIsNeverReplaced) {
  ASSERT_OK(MakeDirectories(dir_ / "from"));
  ASSERT_OK(MakeDirectories(dir_ / "empty"));
  std::ofstream(dir_ / "file") << "x";
  ASSERT_EQ(symlink("nowhere", (dir_ / "link").c_str()), 0);
  for (const char* target : {"empty", "file", "link"}) {
    EXPECT_THAT(PublishDirectory(dir_ / "from", dir_ / target),
                HasCode(absl::StatusCode::kAlreadyExists))
        << target;
  }
  // The same on file systems without RENAME_NOREPLACE.
  recorder = {.is_on = true, .fail_at = 1, .error = EINVAL};
  EXPECT_THAT(PublishDirectory(dir_ / "from", dir_ / "empty"),
              HasCode(absl::StatusCode::kAlreadyExists));
  recorder = {.is_on = true, .fail_at = 1, .error = EINVAL};
  EXPECT_OK(PublishDirectory(dir_ / "from", dir_ / "new"));
  EXPECT_THAT(PublishDirectory(dir_ / "missing", dir_ / "new2"),
              HasCode(absl::StatusCode::kNotFound));
}

TEST_F(PublishTest, MissingAndImpossiblePathsHaveTheirCodes) {
  EXPECT_THAT(PublishFile(dir_ / "no/such/f", "x"), HasCode(absl::StatusCode::kNotFound));
  std::ofstream(dir_ / "file") << "x";
  EXPECT_THAT(PublishFile(dir_ / "file/f", "x"), HasCode(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(MakeDirectories(dir_ / "file/sub"), HasCode(absl::StatusCode::kInvalidArgument));
  ASSERT_OK(MakeDirectories(dir_ / "taken"));
  EXPECT_THAT(PublishFile(dir_ / "taken", "x"), HasCode(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(List(dir_.path()), ElementsAre("file", "taken"));  // no temporary files
}

TEST_F(PublishTest, MessagesNameNoPath) {
  EXPECT_THAT(std::string(PublishFile(dir_ / "no/f", "x").message()), Not(HasSubstr(dir_.path())));
  EXPECT_THAT(std::string(ReadFile(dir_ / "no", 1).status().message()),
              Not(HasSubstr(dir_.path())));
}

// Runs `body` on a fresh tmpfs of 64 KiB; returns false where the kernel gives us no namespace.
bool OnSmallTmpfs(const std::string& mount_point, const std::function<bool()>& body) {
  constexpr int kNoNamespace = 77;
  const pid_t pid = fork();
  if (pid == 0) {
    const bool is_root = geteuid() == 0;
    if (unshare(is_root ? CLONE_NEWNS : CLONE_NEWNS | CLONE_NEWUSER) != 0) _exit(kNoNamespace);
    mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr);
    if (mount("tmpfs", mount_point.c_str(), "tmpfs", 0, "size=64k") != 0) _exit(kNoNamespace);
    _exit(body() ? 0 : 1);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  if (WIFEXITED(status) && WEXITSTATUS(status) == kNoNamespace) return false;
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  return true;
}

TEST_F(PublishTest, AFullFileSystemNamesNeedAndRoom) {
  const bool ran = OnSmallTmpfs(dir_.path(), [this] {
    EXPECT_OK(PublishFile(dir_ / "f", "old"));
    EXPECT_THAT(PublishFile(dir_ / "f", std::string(100'000, 'x')),
                StatusIs(absl::StatusCode::kResourceExhausted,
                         ::testing::MatchesRegex(".*100000 bytes needed, [0-9]+ free")));
    EXPECT_EQ(Read(dir_ / "f"), "old");
    EXPECT_THAT(List(dir_.path()), ElementsAre("f"));
    return !HasFailure();
  });
  if (!ran) GTEST_SKIP() << "no mount namespace here";
}

TEST_F(PublishTest, AReadOnlyFileSystemIsPermissionDenied) {
  const bool ran = OnSmallTmpfs(dir_.path(), [this] {
    EXPECT_EQ(mount(nullptr, dir_.path().c_str(), nullptr, MS_REMOUNT | MS_RDONLY, nullptr), 0);
    EXPECT_THAT(PublishFile(dir_ / "f", "x"), HasCode(absl::StatusCode::kPermissionDenied));
    EXPECT_THAT(MakeDirectories(dir_ / "d"), HasCode(absl::StatusCode::kPermissionDenied));
    return !HasFailure();
  });
  if (!ran) GTEST_SKIP() << "no mount namespace here";
}

TEST_F(PublishTest, ReadingIsBounded) {
  std::ofstream(dir_ / "f") << "12345";
  EXPECT_EQ(*ReadFile(dir_ / "f", 5), "12345");
  EXPECT_THAT(ReadFile(dir_ / "f", 4), StatusIs(absl::StatusCode::kInvalidArgument,
                                                "the file has 5 bytes, at most 4 are read"));
  std::ofstream(dir_ / "empty").close();
  EXPECT_EQ(*ReadFile(dir_ / "empty", 0), "");
  EXPECT_THAT(ReadFile(dir_ / "missing", 5), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(ReadFile(dir_.path(), 5), HasCode(absl::StatusCode::kInvalidArgument));
  ASSERT_EQ(mkfifo((dir_ / "fifo").c_str(), 0600), 0);
  EXPECT_THAT(ReadFile(dir_ / "fifo", 5), HasCode(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(ReadFile("/dev/zero", 5), HasCode(absl::StatusCode::kInvalidArgument));
}

TEST_F(PublishTest, ReadsFilesThatSaySizeZero) {
  EXPECT_THAT(Read("/proc/self/status"), HasSubstr("Pid:"));
  EXPECT_THAT(ReadFile("/proc/self/status", 16), HasCode(absl::StatusCode::kInvalidArgument));
}

TEST_F(PublishTest, DirectoriesAreMadeDurablyOnceAndMeasured) {
  recorder.is_on = true;
  ASSERT_OK(MakeDirectories(dir_ / "a/b"));
  EXPECT_THAT(recorder.steps, ElementsAre("fsync " + Name(dir_), "fsync a"));
  recorder.steps.clear();
  ASSERT_OK(MakeDirectories(dir_ / "a/b"));
  ASSERT_OK(MakeDirectories(dir_ / "a/b/"));
  EXPECT_THAT(recorder.steps, IsEmpty());
  std::ofstream(dir_ / "a/one") << "1";
  std::ofstream(dir_ / "a/b/two") << "22";
  EXPECT_EQ(*TreeBytes(dir_ / "a"), 3);
  EXPECT_GT(*FreeBytes(dir_.path()), 0);
  EXPECT_OK(RemoveTree(dir_ / "a"));
  EXPECT_OK(RemoveTree(dir_ / "a"));
  EXPECT_THAT(TreeBytes(dir_ / "a"), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(FreeBytes(dir_ / "a"), HasCode(absl::StatusCode::kNotFound));
}

TEST(ErrnoStatusTest, CodesOfTheSystem) {
  struct Case {
    int error;
    absl::StatusCode code;
  };
  for (const Case& c :
       {Case{ENOSPC, absl::StatusCode::kResourceExhausted},
        Case{EDQUOT, absl::StatusCode::kResourceExhausted},
        Case{EMFILE, absl::StatusCode::kResourceExhausted},
        Case{EACCES, absl::StatusCode::kPermissionDenied},
        Case{EROFS, absl::StatusCode::kPermissionDenied}, Case{ENOENT, absl::StatusCode::kNotFound},
        Case{EEXIST, absl::StatusCode::kAlreadyExists},
        Case{ENOTEMPTY, absl::StatusCode::kAlreadyExists},
        Case{ENAMETOOLONG, absl::StatusCode::kInvalidArgument},
        Case{EIO, absl::StatusCode::kInternal}}) {
    EXPECT_THAT(ErrnoStatus(c.error, "doing it"), StatusIs(c.code, HasSubstr("doing it: ")));
  }
}

}  // namespace
}  // namespace walsh
