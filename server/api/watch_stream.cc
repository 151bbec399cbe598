#include "server/api/watch_stream.h"

#include <deque>
#include <memory>
#include <utility>

#include "absl/synchronization/mutex.h"
#include "common/grpc_status.h"
#include "common/resource_name.h"
#include "common/status_macros.h"
#include "server/api/call.h"

namespace walsh::api {
namespace {

using v1::QuantizationJobEvent;

class WatchStream : public grpc::ServerWriteReactor<QuantizationJobEvent>,
                    public std::enable_shared_from_this<WatchStream> {
 public:
  WatchStream(grpc::CallbackServerContext* context, Core* core, const std::string& id,
              jobs::TenantView view, int64_t after_sequence)
      : context_(context),
        core_(core),
        id_(id),
        view_(std::move(view)),
        request_id_(EchoRequestId(context)),
        cursor_(after_sequence),
        last_write_(core->clock->Monotonic()) {}

  void Start() {
    self_ = shared_from_this();
    const std::weak_ptr<WatchStream> weak = weak_from_this();
    subscription_ = core_->queue->event_subscriptions().Add(id_, [weak] {
      if (const std::shared_ptr<WatchStream> stream = weak.lock()) stream->OnNews();
    });
    OnNews();
    KeepAlive();
  }

  void OnWriteDone(bool ok) override {
    const absl::MutexLock lock(&mu_);
    is_writing_ = false;
    last_write_ = core_->clock->Monotonic();
    if (!ok) return FinishOnce(absl::CancelledError("the watcher has gone"));
    Advance();
  }

  void OnCancel() override {
    const absl::MutexLock lock(&mu_);
    FinishOnce(absl::CancelledError("the watcher has gone"));
  }

  void OnDone() override {
    // Not under the lock: a notification that runs now holds the subscriptions' and wants ours.
    core_->queue->event_subscriptions().Remove(subscription_);
    std::shared_ptr<WatchStream> self;  // goes after the lock
    const absl::MutexLock lock(&mu_);
    self = std::move(self_);
  }

 private:
  // There may be events beyond the cursor.
  void OnNews() {
    const absl::MutexLock lock(&mu_);
    has_news_ = true;
    Advance();
  }

  void Advance() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (is_finished_) return;
    // A client that does not read is not waited for.
    if (core_->is_stopping && is_writing_) return FinishOnce(Stopping());
    if (is_writing_ || is_reading_) return;
    if (!batch_.empty()) {
      outgoing_ = std::move(batch_.front());
      batch_.pop_front();
      return Write();
    }
    if (is_final_) return FinishOnce(absl::OkStatus());
    if (core_->is_stopping) return FinishOnce(Stopping());
    if (!has_news_) return;
    has_news_ = false;
    is_reading_ = core_->executor->Post([self = shared_from_this()] { self->Read(); });
    if (!is_reading_) FinishOnce(Overloaded(absl::StatusCode::kUnavailable));
  }

  void Write() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    is_writing_ = true;
    write_start_ = core_->clock->Monotonic();
    StartWrite(&outgoing_);
  }

  // On the executor.
  void Read() {
    int64_t after = 0;
    bool has_event = false;
    {
      const absl::MutexLock lock(&mu_);
      after = cursor_;
      has_event = last_event_.sequence() == after;
    }
    absl::StatusOr<jobs::JobQueue::EventBatch> read = core_->queue->ReadEvents(id_, after, view_);
    const bool is_quiet_resume = read.ok() && read->events.empty() && !has_event;
    absl::StatusOr<QuantizationJobEvent> resumed = QuantizationJobEvent();
    if (is_quiet_resume) resumed = EventAt(after);
    const absl::MutexLock lock(&mu_);
    is_reading_ = false;
    if (!read.ok()) return FinishOnce(read.status());
    if (!resumed.ok()) return FinishOnce(resumed.status());
    if (is_quiet_resume) last_event_ = *std::move(resumed);
    if (!read->events.empty()) {
      cursor_ = read->events.back().sequence();
      last_event_ = read->events.back();
      batch_.assign(std::make_move_iterator(read->events.begin()),
                    std::make_move_iterator(read->events.end()));
      has_news_ = true;  // a batch may be full; an empty one ends the reading
    }
    is_final_ = read->is_final;
    Advance();
  }

  // The event, from 1, that a watcher which comes back has already seen: heartbeats repeat it. On
  // the executor.
  absl::StatusOr<QuantizationJobEvent> EventAt(int64_t sequence) const {
    WALSH_ASSIGN_OR_RETURN(jobs::JobQueue::EventBatch batch,
                           core_->queue->ReadEvents(id_, sequence - 1, view_));
    // Sequences have no gaps; a job deleted meanwhile has no events.
    if (batch.events.empty()) return NotFound("job", JobName(id_));
    return std::move(batch.events.front());
  }

  void KeepAlive() {
    const std::weak_ptr<WatchStream> weak = weak_from_this();
    core_->executor->PostAfter(core_->watch_heartbeat / 4, [weak] {
      if (const std::shared_ptr<WatchStream> stream = weak.lock()) stream->Beat();
    });
  }

  void Beat() {
    {
      const absl::MutexLock lock(&mu_);
      if (is_finished_) return;
      const absl::Duration now = core_->clock->Monotonic();
      if (is_writing_ && now - write_start_ >= core_->stream_limits.stall_max) return GiveUp();
      const bool is_idle = !is_writing_ && !is_reading_ && batch_.empty();
      if (is_idle && now - last_write_ >= core_->watch_heartbeat * 0.75) {
        outgoing_ = last_event_;
        outgoing_.clear_linears();
        outgoing_.clear_message();
        outgoing_.set_sequence(cursor_);
        outgoing_.set_heartbeat(true);
        Write();
      }
    }
    KeepAlive();
  }

  void GiveUp() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    FinishOnce(fleet::SlowReader());
    batch_.clear();
    const std::weak_ptr<WatchStream> weak = weak_from_this();
    core_->executor->PostAfter(fleet::kSlowReaderGrace, [weak] {
      const std::shared_ptr<WatchStream> stream = weak.lock();
      if (stream == nullptr) return;
      const absl::MutexLock lock(&stream->mu_);
      if (stream->self_ != nullptr) stream->context_->TryCancel();
    });
  }

  void FinishOnce(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (is_finished_) return;
    is_finished_ = true;
    LogEnd("WatchQuantizationJob", request_id_, status);
    Finish(ToGrpcStatus(status));
  }

  grpc::CallbackServerContext* const context_;  // there until OnDone
  Core* const core_;
  const std::string id_;
  const jobs::TenantView view_;
  const std::string request_id_;
  jobs::Subscriptions::Id subscription_;

  absl::Mutex mu_;
  std::shared_ptr<WatchStream> self_ ABSL_GUARDED_BY(mu_);  // until OnDone
  int64_t cursor_ ABSL_GUARDED_BY(mu_);                     // last sequence that was read
  std::deque<QuantizationJobEvent> batch_ ABSL_GUARDED_BY(mu_);
  QuantizationJobEvent outgoing_;  // of the write in flight
  QuantizationJobEvent last_event_ ABSL_GUARDED_BY(mu_);
  absl::Duration write_start_ ABSL_GUARDED_BY(mu_);  // of the write in flight
  absl::Duration last_write_ ABSL_GUARDED_BY(mu_);   // the end of the last one
  bool has_news_ ABSL_GUARDED_BY(mu_) = false;
  bool is_writing_ ABSL_GUARDED_BY(mu_) = false;
  bool is_reading_ ABSL_GUARDED_BY(mu_) = false;
  bool is_final_ ABSL_GUARDED_BY(mu_) = false;
  bool is_finished_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace

grpc::ServerWriteReactor<QuantizationJobEvent>* WatchJob(grpc::CallbackServerContext* context,
                                                         Core* core, const std::string& id,
                                                         const jobs::TenantView& view,
                                                         int64_t after_sequence) {
  auto stream = std::make_shared<WatchStream>(context, core, id, view, after_sequence);
  stream->Start();
  return stream.get();
}

}  // namespace walsh::api
