// A file of a request, and the name that it was asked for by.
//
// They differ where the name is a link: in a Hugging Face cache eval.jsonl leads to blobs/<digest>.
// What a name tells, the format by its ending or a task's name, is in the one that was asked for;
// it is also the only one that may be shown, since what a link leads to need not be UTF-8.
#pragma once

#include <string>

namespace walsh {

struct NamedFile {
  std::string path;  // resolved
  std::string name;  // empty: the path
  const std::string& shown() const { return name.empty() ? path : name; }
};

}  // namespace walsh
