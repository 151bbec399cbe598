// Follows a job to its end for `walsh quantize` and `walsh jobs watch`.
#pragma once

#include <string>

#include "client/client.h"
#include "client/terminal/interrupts.h"

namespace walsh::client {

struct FollowOptions {
  std::string name;
  std::string walsh = "walsh";  // WalshCommand(), for what to type next
  int64_t after_sequence = 0;
  bool json = false;         // the final job as JSON instead of a report
  bool json_events = false;  // every event as a line of JSON instead of progress and report
};

// Progress goes to standard error, the report to standard output. kExitOk when the job succeeded.
// `cancellation` stops following: the job goes on unless the person says otherwise when asked. The
// caller lets Ctrl-C cancel it.
int FollowJob(Client& client, Interrupts& interrupts, Cancellation& cancellation,
              const FollowOptions& options);

}  // namespace walsh::client
