// Which files of this machine a request may name.
//
// A worker reads models, calibration and evaluation texts beneath its configured roots only. A
// reference is absolute or relative to a root. The kernel resolves it beneath that root (openat2),
// and follows symbolic links that stay there, of which the Hugging Face cache is full. Where a link
// leads elsewhere, that place must be beneath one of the roots, too, without any further link; what
// passes through one of /proc's links to open files and other roots never is. The same holds for
// every entry of a model directory. A folder inside a root may be taken out: what is beneath it is
// outside. Kernels before 5.6 have no openat2; there a path is resolved first and compared then.
//
// Errors:  INVALID_ARGUMENT  empty, too long, not UTF-8, with control characters, a URL, or outside
//                            every root, whether or not something is there
//          NOT_FOUND         nothing there; messages repeat the caller's reference, never a root
// Threads: safe.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace walsh {

class ModelRoots {
 public:
  // Each root must be an existing directory; relative ones are taken from the working directory.
  // Those of `excluded` need not exist yet; one that is itself a root, or holds one, is none for
  // it.
  static absl::StatusOr<ModelRoots> Create(const std::vector<std::string>& roots,
                                           const std::vector<std::string>& excluded = {});

  // The canonical path of a file or directory. `reference` may be relative to any of the roots; the
  // first that has it wins.
  absl::StatusOr<std::string> Resolve(std::string_view reference) const;

 private:
  ModelRoots(std::vector<std::string> roots, std::vector<std::string> excluded)
      : roots_(std::move(roots)), excluded_(std::move(excluded)) {}

  // What a path was found to be: its canonical form, or why there is none.
  struct Found {
    std::string path = {};
    int error = 0;  // errno
  };
  static Found Open(int directory, const std::string& path, uint64_t resolve);
  static Found Canonical(const std::string& path);
  // EXDEV: it leads out of the root that it begins with, or begins with none.
  Found OpenBeneathRoot(const std::string& path, uint64_t resolve) const;
  // NOT_FOUND, or INVALID_ARGUMENT when it is outside; without messages.
  absl::StatusOr<std::string> Find(const std::string& path) const;
  bool IsBeneathRoot(const std::string& canonical) const;
  absl::Status CheckEntries(std::string_view reference, const std::string& directory) const;

  std::vector<std::string> roots_, excluded_;  // canonical
};

}  // namespace walsh
