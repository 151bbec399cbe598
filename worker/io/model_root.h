// Which files of this machine a request may name.
//
// A worker reads models, calibration and evaluation texts beneath its configured roots only. A
// reference is absolute or relative to a root; it is resolved with symbolic links followed, and
// what it resolves to must lie beneath a root (so a link may lead from one root to another, as the
// Hugging Face cache does inside itself). The same holds for every entry of a model directory. A
// folder inside a root may be taken out: what is beneath it is outside.
//
// Errors:  INVALID_ARGUMENT  empty, too long, not UTF-8, with control characters, or outside every
//                            root, whether or not something is there
//          NOT_FOUND         nothing there; messages repeat the caller's reference, never a root
// Threads: safe.
#pragma once

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

  bool IsBeneathRoot(const std::string& canonical) const;
  absl::Status CheckEntries(std::string_view reference, const std::string& directory) const;

  std::vector<std::string> roots_, excluded_;  // canonical
};

}  // namespace walsh
