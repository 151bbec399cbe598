#include "tests/testing/test_disks.h"

#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "common/check.h"

namespace walsh::testing {
namespace {

constexpr char kImageSize[] = "64M";

bool Run(const std::string& command) {
  return std::system((command + " > /dev/null 2>&1").c_str()) == 0;
}

timespec LastWrite(const std::string& path) {
  struct stat info = {};
  WALSH_CHECK(stat(path.c_str(), &info) == 0);
  return info.st_mtim;
}

}  // namespace

bool CrashDisk::IsPossible() {
  static const bool is_possible = [] {
    if (geteuid() != 0 || !Run("which mkfs.ext4")) return false;
    const TempDir dir;
    std::filesystem::create_directory(dir / "disk");
    const bool is_mounted =
        Run(absl::StrCat("truncate -s ", kImageSize, " ", dir / "image", " && mkfs.ext4 -q ",
                         dir / "image", " && mount -o loop ", dir / "image", " ", dir / "disk"));
    if (is_mounted) WALSH_CHECK(umount((dir / "disk").c_str()) == 0);
    return is_mounted;
  }();
  return is_possible;
}

CrashDisk::CrashDisk() {
  WALSH_CHECK(Run(absl::StrCat("truncate -s ", kImageSize, " ", ImagePath(), " && mkfs.ext4 -q ",
                               ImagePath())));
  Mount();
}

CrashDisk::CrashDisk(const CrashDisk& other) {
  // The kernel may write behind a process that is stopped: then the copy is of no one moment.
  timespec before = {};
  do {
    before = LastWrite(other.ImagePath());
    std::filesystem::copy_file(other.ImagePath(), ImagePath(),
                               std::filesystem::copy_options::overwrite_existing);
  } while (LastWrite(other.ImagePath()).tv_sec != before.tv_sec ||
           LastWrite(other.ImagePath()).tv_nsec != before.tv_nsec);
  Mount();
}

CrashDisk::~CrashDisk() { WALSH_CHECK(umount2(path().c_str(), MNT_DETACH) == 0); }

void CrashDisk::Mount() const {
  std::filesystem::create_directory(path());
  WALSH_CHECK(Run(absl::StrCat("mount -o loop ", ImagePath(), " ", path())));
}

bool SmallDisk::IsPossible() {
  static const bool is_possible = [] {
    if (geteuid() != 0) return false;
    const TempDir dir;
    if (mount("tmpfs", dir.path().c_str(), "tmpfs", 0, "size=4096") != 0) return false;
    WALSH_CHECK(umount(dir.path().c_str()) == 0);
    return true;
  }();
  return is_possible;
}

SmallDisk::SmallDisk(int64_t n_bytes) {
  WALSH_CHECK(mount("tmpfs", path().c_str(), "tmpfs", 0, absl::StrCat("size=", n_bytes).c_str()) ==
              0);
}

SmallDisk::~SmallDisk() { WALSH_CHECK(umount2(path().c_str(), MNT_DETACH) == 0); }

void SmallDisk::Resize(int64_t n_bytes) const {
  WALSH_CHECK(mount("tmpfs", path().c_str(), "tmpfs", MS_REMOUNT,
                    absl::StrCat("size=", n_bytes).c_str()) == 0);
}

}  // namespace walsh::testing
