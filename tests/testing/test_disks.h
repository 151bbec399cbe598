// Disks of a test's own, mounted: one that loses its power, and one that gets full. Both need root.
#pragma once

#include <cstdint>
#include <string>

#include "tests/testing/test_data.h"

namespace walsh::testing {

// An ext4 image on a loop device. What the file system has not yet written is not in the image, so
// that a copy is what a power cut would leave.
//
//   if (!CrashDisk::IsPossible()) GTEST_SKIP() << CrashDisk::kNeeds;
//   CrashDisk disk;
//   … run something on disk.path(), and stop it (SIGSTOP) …
//   const CrashDisk after(disk);  // mounted, as after the power came back
class CrashDisk {
 public:
  static constexpr char kNeeds[] = "needs root, mkfs.ext4 and loop devices";
  static bool IsPossible();

  CrashDisk();
  // What is in the other's image at one moment, with its journal replayed.
  CrashDisk(const CrashDisk& other);
  CrashDisk& operator=(const CrashDisk&) = delete;
  ~CrashDisk();

  // The root of the file system. Nothing may run there when the object goes.
  std::string path() const { return dir_ / "disk"; }

 private:
  std::string ImagePath() const { return dir_ / "image"; }
  void Mount() const;

  const TempDir dir_;
};

// A file system in memory of so many bytes.
class SmallDisk {
 public:
  static constexpr char kNeeds[] = "needs root and tmpfs";
  static bool IsPossible();

  explicit SmallDisk(int64_t n_bytes);
  ~SmallDisk();
  SmallDisk(const SmallDisk&) = delete;
  SmallDisk& operator=(const SmallDisk&) = delete;

  std::string path() const { return dir_.path(); }
  // Changes its size; what is there stays.
  void Resize(int64_t n_bytes) const;

 private:
  const TempDir dir_;
};

}  // namespace walsh::testing
