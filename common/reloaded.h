// A value that files hold, which follows them while the process runs.
//
// Poll() reads the files again. What loads and differs takes the value's place; what does not load
// changes nothing but a warning in the log and walsh_config_last_reload_successful: the last good
// value stays in use. Files are compared by what they hold and not by their times, which a mounted
// secret or a copy may keep.
//
// Threads: safe. Poll is for one thread at a time.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace walsh {

// How often daemons look.
inline constexpr absl::Duration kReloadInterval = absl::Seconds(1);

// Tells operators how reloading goes: log, walsh_config_reloads_total and
// walsh_config_last_reload_successful, with `name` as the label `config`.
class ReloadReport {
 public:
  explicit ReloadReport(std::string name);
  void Loaded(bool is_change);
  void Failed(const absl::Status& status);

 private:
  const std::string name_;
  absl::Status last_;  // so that what stays wrong is told once
};

template <typename T>
class Reloaded {
 public:
  struct Source {
    std::string name;  // a label: of a fixed set
    std::function<absl::StatusOr<T>()> load;
    std::function<void(const T&)> on_change;  // at first, too; may be null
  };
  // Fails where the first load does.
  static absl::StatusOr<std::unique_ptr<Reloaded>> Open(Source source) {
    absl::StatusOr<T> first = source.load();
    if (!first.ok()) return first.status();
    if (source.on_change) source.on_change(*first);
    return std::unique_ptr<Reloaded>(new Reloaded(std::move(source), *std::move(first)));
  }

  // Another pointer is another value.
  std::shared_ptr<const T> Get() const {
    const absl::MutexLock lock(&mu_);
    return current_;
  }

  void Poll() {
    absl::StatusOr<T> loaded = source_.load();
    if (!loaded.ok()) return report_.Failed(loaded.status());
    const bool is_change = *loaded != *Get();
    if (is_change) {
      if (source_.on_change) source_.on_change(*loaded);
      const absl::MutexLock lock(&mu_);
      current_ = std::make_shared<const T>(*std::move(loaded));
    }
    report_.Loaded(is_change);
  }

 private:
  Reloaded(Source source, T first)
      : source_(std::move(source)),
        report_(source_.name),
        current_(std::make_shared<const T>(std::move(first))) {}

  const Source source_;
  ReloadReport report_;
  mutable absl::Mutex mu_;
  std::shared_ptr<const T> current_ ABSL_GUARDED_BY(mu_);
};

}  // namespace walsh
