// Lets others have the device between the steps of a job.
//
// A job asks at the end of each step, which is some ten milliseconds of work, and waits where that
// is wanted. What it makes does not depend on it.
//
// Threads: used by the job's thread
#pragma once

#include "absl/status/status.h"
#include "common/keep_going.h"

namespace walsh::pipeline {

class Yield {
 public:
  virtual ~Yield() = default;
  // A step has ended: whether the job is to wait before the next one. Asked often, so it must be
  // cheap where the answer is no.
  virtual bool IsWanted() = 0;
  // Returns when the job may go on. Asks `keep_going` at least every 50 ms meanwhile; a status that
  // is not OK ends the wait and is returned.
  virtual absl::Status Wait(const KeepGoing& keep_going) = 0;
};

}  // namespace walsh::pipeline
