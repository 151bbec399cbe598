// Ctrl-C as an event: the first does what the command set, a second one leaves.
//
// A signal handler may do next to nothing, least of all cancel a gRPC call; here SIGINT is blocked
// in every thread and one thread waits for it. Construct it before anything starts threads (gRPC
// does with the first channel), so that they inherit the mask.
//
// Threads: safe; actions run on the object's thread.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <thread>

#include "absl/synchronization/mutex.h"
#include "common/grpc_cancellation.h"

namespace walsh::client {

class Interrupts {
 public:
  Interrupts();
  ~Interrupts();
  Interrupts(const Interrupts&) = delete;
  Interrupts& operator=(const Interrupts&) = delete;

  // The next Ctrl-C runs `action` once; the one after it ends the process with kExitFailed, as does
  // any Ctrl-C while no action is set. Returns when no earlier action runs any more, so that what
  // it refers to may go; not to be called from an action.
  void OnNext(std::function<void()> action);

  // The next Ctrl-C cancels `cancellation`, while the object lives.
  class Cancels {
   public:
    Cancels(Interrupts& interrupts, Cancellation& cancellation);
    ~Cancels();
    Cancels(const Cancels&) = delete;
    Cancels& operator=(const Cancels&) = delete;

   private:
    Interrupts& interrupts_;
  };

  enum class Read { kLine, kEnd, kInterrupted };
  // Reads a line of standard input without its newline; Ctrl-C ends the wait.
  Read ReadLine(std::string* line);

 private:
  void Run();

  int signal_fd_ = -1;
  int stop_fd_ = -1;  // readable: Run() returns
  int wake_fd_ = -1;  // readable: ReadLine() was interrupted
  std::string unread_;
  absl::Mutex mu_;
  std::function<void()> action_ ABSL_GUARDED_BY(mu_);
  bool is_running_ ABSL_GUARDED_BY(mu_) = false;  // an action
  std::thread thread_;
};

}  // namespace walsh::client
