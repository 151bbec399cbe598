#include "client/terminal/progress.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/terminal/quantities.h"
#include "client/terminal/safe_text.h"
#include "client/terminal/terminal.h"
#include "common/utf8.h"

namespace walsh::client {
namespace {

constexpr int kBarWidthMax = 40;
constexpr int kBarWidthMin = 6;

// "QUANTIZING" while running, else the state.
std::string Activity(const v1::QuantizationJobEvent& event) {
  if (event.state() == v1::QuantizationJob::RUNNING &&
      event.stage() != v1::QuantizationJob::STAGE_UNSPECIFIED) {
    return v1::QuantizationJob::Stage_Name(event.stage());
  }
  return v1::QuantizationJob::State_Name(event.state());
}

bool IsLayered(v1::QuantizationJob::Stage stage) {
  return stage == v1::QuantizationJob::CALIBRATING || stage == v1::QuantizationJob::QUANTIZING ||
         stage == v1::QuantizationJob::PACKING;
}

// "layer 12/30", counted from 1, or empty.
std::string LayerText(const v1::QuantizationJobEvent& event) {
  if (event.state() != v1::QuantizationJob::RUNNING || !IsLayered(event.stage()) ||
      event.layer() < 0 || event.progress().layers_total() <= 0) {
    return "";
  }
  return absl::StrFormat("layer %d/%d", event.layer() + 1, event.progress().layers_total());
}

std::string PercentText(const v1::QuantizationJobEvent& event) {
  return absl::StrFormat("%.0f %%", 100.0 * std::clamp(event.progress().fraction(), 0.0, 1.0));
}

std::string EtaText(const v1::QuantizationJobEvent& event) {
  if (!event.progress().has_eta() || event.state() != v1::QuantizationJob::RUNNING) return "";
  return "ETA " + ClockText(absl::Seconds(event.progress().eta().seconds()) +
                            absl::Nanoseconds(event.progress().eta().nanos()));
}

std::string Bar(double fraction, int width) {
  const int inner = width - 2;
  const int filled = static_cast<int>(std::clamp(fraction, 0.0, 1.0) * inner + 0.5);
  return absl::StrCat("[", std::string(static_cast<size_t>(filled), '#'),
                      std::string(static_cast<size_t>(inner - filled), '-'), "]");
}

}  // namespace

std::string ProgressLine(const v1::QuantizationJobEvent& event, int width) {
  std::string left = absl::StrFormat("%-11s", Activity(event));
  if (const std::string layer = LayerText(event); !layer.empty()) left += " " + layer;
  // Padded, so that the bar keeps its place.
  std::string right = absl::StrFormat("%5s", PercentText(event));
  if (const std::string eta = EtaText(event); !eta.empty()) right += "  " + eta;
  const int room = width - static_cast<int>(left.size() + right.size()) - 2;
  std::string line = left + " ";
  if (room >= kBarWidthMin) {
    line += Bar(event.progress().fraction(), std::min(room, kBarWidthMax)) + " ";
  }
  line += right;
  return std::string(Utf8Prefix(line, static_cast<size_t>(std::max(width, 0))));
}

void ProgressPrinter::OnEvent(const v1::QuantizationJobEvent& event) {
  if (event.state() == v1::QuantizationJob::STATE_UNSPECIFIED) {
    // The line is drawn again: a message may have taken its place.
    if (last_.state() != v1::QuantizationJob::STATE_UNSPECIFIED && options_.redraw) Draw(last_);
    return;
  }
  last_ = event;
  if (event.attempt() > attempt_) {
    if (attempt_ > 0) PrintLine(absl::StrCat("attempt ", event.attempt(), " begins"));
    attempt_ = event.attempt();
  }
  // Back in the queue: why, for it may stay there.
  const bool is_back = event.state() == v1::QuantizationJob::QUEUED && event.attempt() > 0;
  if (is_back && !event.heartbeat()) PrintLine(SafeText(event.message()));
  if (options_.redraw) {
    Draw(event);
  } else if (!event.heartbeat()) {
    const std::string layer = LayerText(event);
    // One line a layer is enough; its stages follow each other in moments.
    const std::string about = layer.empty() ? Activity(event) : layer;
    if (about == last_plain_) return;
    last_plain_ = about;
    std::string line =
        absl::StrCat(Activity(event), layer.empty() ? "" : " ", layer, ", ", PercentText(event));
    if (const std::string eta = EtaText(event); !eta.empty()) line += ", " + eta;
    PrintLine(line);
  }
}

void ProgressPrinter::OnDisconnect(const absl::Status& reason, absl::Duration pause) {
  PrintLine(absl::StrCat("connection lost (", SafeText(std::string(reason.message())),
                         "), trying again in ", SecondsText(absl::ToDoubleSeconds(pause))));
}

void ProgressPrinter::Clear() {
  if (!drawn_) return;
  std::fputs("\r\033[K", options_.out);
  std::fflush(options_.out);
  drawn_ = false;
}

void ProgressPrinter::Draw(const v1::QuantizationJobEvent& event) {
  // The last column stays free: some terminals wrap when it is filled.
  std::fprintf(options_.out, "\r\033[K%s",
               ProgressLine(event, TerminalWidth(fileno(options_.out)) - 1).c_str());
  std::fflush(options_.out);
  drawn_ = true;
}

void ProgressPrinter::PrintLine(const std::string& line) {
  Clear();
  std::fprintf(options_.out, "%s\n", line.c_str());
  std::fflush(options_.out);
}

}  // namespace walsh::client
