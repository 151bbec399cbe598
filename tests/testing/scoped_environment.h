// Sets or unsets an environment variable and puts it back. Not for tests with running threads.
#pragma once

#include <cstdlib>
#include <optional>
#include <string>

namespace walsh::testing {

class ScopedEnvironment {
 public:
  // A null value unsets.
  ScopedEnvironment(const char* name, const char* value) : name_(name) {
    if (const char* before = std::getenv(name)) before_ = before;
    Set(value);
  }
  ~ScopedEnvironment() { Set(before_ ? before_->c_str() : nullptr); }
  ScopedEnvironment(const ScopedEnvironment&) = delete;
  ScopedEnvironment& operator=(const ScopedEnvironment&) = delete;

 private:
  void Set(const char* value) const {
    if (value == nullptr) {
      unsetenv(name_.c_str());
    } else {
      setenv(name_.c_str(), value, /*overwrite=*/1);
    }
  }

  std::string name_;
  std::optional<std::string> before_;
};

}  // namespace walsh::testing
