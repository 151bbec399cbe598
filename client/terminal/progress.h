// A job's progress: one redrawn line on a terminal, plain lines in a pipe.
//
//   QUANTIZING    layer 12/30 [#############------------------]  41 %  ETA 1:23
#pragma once

#include <cstdio>
#include <set>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "walsh/v1/quantization.pb.h"

namespace walsh::client {

// `width` columns at most; what does not fit is left out from the bar first, then from the right.
std::string ProgressLine(const v1::QuantizationJobEvent& event, int width);

class ProgressPrinter {
 public:
  struct Options {
    std::FILE* out = stderr;
    bool redraw = false;  // `out` is a terminal
  };
  explicit ProgressPrinter(const Options& options) : options_(options) {}
  // Ends the redrawn line, if one stands.
  ~ProgressPrinter() { Clear(); }
  ProgressPrinter(const ProgressPrinter&) = delete;
  ProgressPrinter& operator=(const ProgressPrinter&) = delete;

  // A heartbeat without a state only shows that the service is there.
  void OnEvent(const v1::QuantizationJobEvent& event);
  void OnDisconnect(const absl::Status& reason, absl::Duration pause);
  // Takes the redrawn line away, for other output.
  void Clear();

 private:
  void Draw(const v1::QuantizationJobEvent& event);
  void PrintLine(const std::string& line);

  const Options options_;
  bool drawn_ = false;
  v1::QuantizationJobEvent last_;  // with a state
  int attempt_ = 0;
  std::string last_plain_;  // what the last plain line was about: stage and layer
};

}  // namespace walsh::client
