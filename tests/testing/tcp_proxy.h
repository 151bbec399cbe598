// A network between two processes on this machine that does what a test says: TCP connections to
// address() go on to a target, late, slowly, in part, broken or damaged.
//
// Threads: safe; one thread of its own.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace walsh::testing {

class TcpProxy {
 public:
  enum Direction { kRequests, kAnswers };  // from who connects; from the target

  // `target` is 127.0.0.1:port.
  explicit TcpProxy(const std::string& target);
  ~TcpProxy();
  TcpProxy(const TcpProxy&) = delete;
  TcpProxy& operator=(const TcpProxy&) = delete;

  const std::string& address() const { return address_; }
  int n_connections() const;                   // that are open
  int n_accepted() const;                      // so far
  int64_t n_bytes(Direction direction) const;  // passed on so far

  // -- What happens from now on, to connections that are open as well.
  void SetDelay(absl::Duration delay);            // of each piece of bytes, in order
  void SetRate(double bytes_per_second);          // of each direction of each connection; 0: any
  void Swallow(Direction direction, bool is_on);  // bytes are taken and vanish
  // Answers are swallowed from the moment that these bytes are among a connection's requests.
  void SwallowAnswersTo(const std::string& request);
  bool has_swallowed_answers() const;  // to such a request

  // -- Once, to all connections that are open.
  void Reset();                                                // RST to both sides
  void HalfClose(Direction direction);                         // FIN after what was passed on
  void Inject(Direction direction, const std::string& bytes);  // between other bytes

 private:
  struct Connection;

  void Loop();
  void Accept() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // False when the connection is over.
  bool Read(Connection* connection, Direction direction) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool Write(Connection* connection, Direction direction) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const int target_port_;
  int listener_ = -1;
  std::string address_;
  mutable absl::Mutex mu_;
  std::vector<std::unique_ptr<Connection>> connections_ ABSL_GUARDED_BY(mu_);
  absl::Duration delay_ ABSL_GUARDED_BY(mu_);
  double rate_ ABSL_GUARDED_BY(mu_) = 0;
  bool swallows_[2] ABSL_GUARDED_BY(mu_) = {false, false};
  std::string swallowed_request_ ABSL_GUARDED_BY(mu_);
  bool has_swallowed_answers_ ABSL_GUARDED_BY(mu_) = false;
  int n_accepted_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t n_bytes_[2] ABSL_GUARDED_BY(mu_) = {0, 0};
  bool is_over_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

}  // namespace walsh::testing
