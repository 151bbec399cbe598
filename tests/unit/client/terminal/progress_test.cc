#include "client/terminal/progress.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>

namespace walsh::client {
namespace {

using Job = v1::QuantizationJob;

v1::QuantizationJobEvent Event(Job::Stage stage, int layer, double fraction) {
  v1::QuantizationJobEvent event;
  event.set_state(Job::RUNNING);
  event.set_stage(stage);
  event.set_layer(layer);
  event.set_attempt(1);
  event.mutable_progress()->set_layers_total(30);
  event.mutable_progress()->set_layers_done(layer);
  event.mutable_progress()->set_fraction(fraction);
  return event;
}

// What a printer writes, through a file in memory.
class Recorder {
 public:
  Recorder() : file_(open_memstream(&text_, &size_)) {}
  ~Recorder() {
    std::fclose(file_);
    std::free(text_);
  }
  std::FILE* file() { return file_; }
  std::string text() {
    std::fflush(file_);
    return std::string(text_, size_);
  }

 private:
  char* text_ = nullptr;
  size_t size_ = 0;
  std::FILE* file_;
};

TEST(ProgressLineTest, ShowsStageLayerBarShareAndEta) {
  v1::QuantizationJobEvent event = Event(Job::QUANTIZING, 11, 0.41);
  event.mutable_progress()->mutable_eta()->set_seconds(83);
  EXPECT_EQ(ProgressLine(event, 70),
            "QUANTIZING  layer 12/30 [###########-----------------]  41 %  ETA 1:23");
}

TEST(ProgressLineTest, FitsEveryWidth) {
  v1::QuantizationJobEvent event = Event(Job::CALIBRATING, 29, 1.0);
  event.mutable_progress()->mutable_eta()->set_seconds(4000);
  for (int width = 0; width <= 200; ++width) {
    const std::string line = ProgressLine(event, width);
    EXPECT_LE(line.size(), static_cast<size_t>(width));
    if (width >= 50) {
      EXPECT_NE(line.find("ETA 1:06:40"), std::string::npos) << line;
    }
  }
}

TEST(ProgressLineTest, LeavesOutWhatIsNotKnown) {
  EXPECT_EQ(ProgressLine(Event(Job::LOADING, -1, 0), 40).find("layer"), std::string::npos);
  v1::QuantizationJobEvent queued;
  queued.set_state(Job::QUEUED);
  EXPECT_EQ(ProgressLine(queued, 30), "QUEUED      [----------]   0 %");
  queued.mutable_progress()->set_fraction(7);  // a wrong figure must not break the line
  EXPECT_EQ(ProgressLine(queued, 30), "QUEUED      [##########] 100 %");
}

TEST(ProgressPrinterTest, InAPipeEachLayerIsOneLine) {
  Recorder recorder;
  {
    ProgressPrinter printer({.out = recorder.file(), .redraw = false});
    printer.OnEvent(Event(Job::LOADING, -1, 0.01));
    for (int layer = 0; layer < 2; ++layer) {
      for (const Job::Stage stage : {Job::CALIBRATING, Job::QUANTIZING, Job::PACKING}) {
        printer.OnEvent(Event(stage, layer, 0.1 * (layer + 1)));
      }
    }
    v1::QuantizationJobEvent heartbeat = Event(Job::EVALUATING, -1, 0.9);
    heartbeat.set_heartbeat(true);
    printer.OnEvent(heartbeat);
  }
  EXPECT_EQ(recorder.text(),
            "LOADING, 1 %\n"
            "CALIBRATING layer 1/30, 10 %\n"
            "CALIBRATING layer 2/30, 20 %\n");
}

TEST(ProgressPrinterTest, OnATerminalTheLineIsRedrawnAndTakenAway) {
  Recorder recorder;
  {
    ProgressPrinter printer({.out = recorder.file(), .redraw = true});
    printer.OnEvent(Event(Job::QUANTIZING, 0, 0.1));
    printer.OnEvent(Event(Job::QUANTIZING, 1, 0.2));
    EXPECT_EQ(recorder.text().find('\n'), std::string::npos);
  }
  const std::string text = recorder.text();
  EXPECT_EQ(text.substr(text.size() - 4), "\r\033[K");
  EXPECT_NE(text.find("layer 2/30"), std::string::npos);
}

// A heartbeat of the watch may say nothing of the job.
TEST(ProgressPrinterTest, AHeartbeatWithoutAStateRedrawsWhatWasKnown) {
  v1::QuantizationJobEvent heartbeat;
  heartbeat.set_heartbeat(true);
  Recorder recorder;
  ProgressPrinter printer({.out = recorder.file(), .redraw = true});
  printer.OnEvent(heartbeat);
  EXPECT_EQ(recorder.text(), "");
  printer.OnEvent(Event(Job::QUANTIZING, 1, 0.2));
  const std::string line = recorder.text();
  printer.OnEvent(heartbeat);
  EXPECT_EQ(recorder.text(), line + line);
}

TEST(ProgressPrinterTest, TellsWhyAJobIsBackInTheQueue) {
  Recorder recorder;
  ProgressPrinter printer({.out = recorder.file(), .redraw = false});
  v1::QuantizationJobEvent queued;
  queued.set_state(Job::QUEUED);
  queued.set_message("queued");
  printer.OnEvent(queued);
  v1::QuantizationJobEvent running;
  running.set_state(Job::RUNNING);
  running.set_attempt(1);
  printer.OnEvent(running);
  queued.set_attempt(1);
  queued.set_message("left to other workers, workers/w1 cannot run it: head_dim 80");
  printer.OnEvent(queued);
  queued.set_heartbeat(true);
  printer.OnEvent(queued);
  EXPECT_EQ(recorder.text(),
            "QUEUED, 0 %\n"
            "RUNNING, 0 %\n"
            "left to other workers, workers/w1 cannot run it: head_dim 80\n"
            "QUEUED, 0 %\n");
}

TEST(ProgressPrinterTest, TellsOfNewAttemptsAndLostConnections) {
  Recorder recorder;
  ProgressPrinter printer({.out = recorder.file(), .redraw = false});
  printer.OnEvent(Event(Job::LOADING, -1, 0.01));
  printer.OnDisconnect(absl::UnavailableError("gone"), absl::Seconds(2));
  v1::QuantizationJobEvent again = Event(Job::LOADING, -1, 0.01);
  again.set_attempt(2);
  printer.OnEvent(again);
  EXPECT_EQ(recorder.text(),
            "LOADING, 1 %\n"
            "connection lost (gone), trying again in 2.00 s\n"
            "attempt 2 begins\n");
}

}  // namespace
}  // namespace walsh::client
