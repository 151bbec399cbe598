#include "server/fleet/stream_proxy.h"

#include <deque>
#include <optional>
#include <utility>

#include "absl/synchronization/mutex.h"
#include "common/clock.h"
#include "common/grpc_status.h"
#include "walsh/v1/generation.pb.h"
#include "walsh/v1/model.pb.h"

namespace walsh::fleet {
namespace {

constexpr absl::Duration kSlowReaderRetry = absl::Seconds(1);

template <typename Response>
class StreamProxy : public StreamReactor<Response>,
                    public std::enable_shared_from_this<StreamProxy<Response>> {
 public:
  StreamProxy(grpc::CallbackServerContext* context, ForwardedCalls* calls,
              const StreamLimits& limits, Executor* executor, StartStream<Response> start,
              std::function<void(const absl::Status&)> done, GoElsewhere go_elsewhere)
      : server_context_(context),
        calls_(calls),
        limits_(limits),
        executor_(executor),
        start_(std::move(start)),
        done_(std::move(done)),
        go_elsewhere_(std::move(go_elsewhere)) {}

  void Start(absl::Duration timeout) {
    server_side_ = this->shared_from_this();
    worker_side_ = this->shared_from_this();
    deadline_ = absl::Now() + timeout;
    StartCall();
    WatchForStall();
  }

  // -- Reactions of the client's call

  void OnWriteDone(bool ok) override {
    const absl::MutexLock lock(&mu_);
    is_writing_ = false;
    buffer_.pop_front();
    if (!ok) return GiveUp(absl::CancelledError("the client has gone"));
    Advance();
  }

  void OnCancel() override {
    const absl::MutexLock lock(&mu_);
    GiveUp(absl::CancelledError("the client has gone"));
  }

  void OnDone() override {
    std::shared_ptr<StreamProxy> self;  // goes after the lock
    const absl::MutexLock lock(&mu_);
    is_server_done_ = true;
    self = std::move(server_side_);
  }

 private:
  class Reader : public StreamReader<Response> {
   public:
    explicit Reader(StreamProxy* proxy) : proxy_(proxy) {}
    void OnReadDone(bool ok) override { proxy_->OnWorkerRead(ok); }
    void OnDone(const grpc::Status& status) override { proxy_->OnWorkerDone(status); }

   private:
    StreamProxy* const proxy_;
  };

  struct WorkerCall {
    explicit WorkerCall(StreamProxy* proxy) : counted(proxy->calls_, &context), reader(proxy) {}
    grpc::ClientContext context;
    const ForwardedCalls::Call counted;
    Reader reader;
  };

  // The first call, or the one that follows another, of which everything is over.
  void StartCall() {
    auto call = std::make_unique<WorkerCall>(this);
    call->context.set_deadline(absl::ToChronoTime(deadline_));
    start_(&call->context, &call->reader);
    Reader& reader = call->reader;
    // Reads are started from the server's reactions too, which the worker's call must outlive.
    reader.AddHold();
    {
      const absl::MutexLock lock(&mu_);
      call_.swap(call);
      is_held_ = true;
      if (is_finished_) {
        call_->context.TryCancel();
        RemoveHold();
      } else {
        StartRead();
      }
    }
    reader.StartCall();
  }

  bool MayGoElsewhere() {
    const absl::MutexLock lock(&mu_);
    return go_elsewhere_ != nullptr && !has_read_ && !is_finished_;
  }

  void OnWorkerRead(bool ok) {
    const absl::MutexLock lock(&mu_);
    is_reading_ = false;
    if (!ok || is_finished_) return RemoveHold();
    has_read_ = true;
    buffer_.push_back(std::move(incoming_));
    incoming_.Clear();
    Advance();
  }

  void OnWorkerDone(const grpc::Status& status) {
    const absl::Status ended = calls_->Meaning(FromWorker(status));
    if (!ended.ok() && MayGoElsewhere() && go_elsewhere_(ended)) return StartCall();
    done_(GivenUp().value_or(ended));
    std::shared_ptr<StreamProxy> self;  // goes after the lock
    const absl::MutexLock lock(&mu_);
    worker_status_ = ended;
    Advance();
    self = std::move(worker_side_);
  }

  // What the client's call ended with before the worker's did.
  std::optional<absl::Status> GivenUp() {
    const absl::MutexLock lock(&mu_);
    return client_status_;
  }

  // Writes, reads or ends, whatever can be done now.
  void Advance() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (is_finished_) return;
    if (!is_writing_ && !buffer_.empty()) {
      is_writing_ = true;
      write_start_ = Clock::Real()->Monotonic();
      this->StartWrite(&buffer_.front());
    }
    if (worker_status_.has_value()) {
      if (buffer_.empty()) FinishOnce(*worker_status_);
      return;
    }
    const bool has_room = static_cast<int>(buffer_.size()) < limits_.chunks_max;
    if (!is_reading_ && is_held_ && has_room) StartRead();
  }

  void StartRead() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    is_reading_ = true;
    call_->reader.StartRead(&incoming_);
  }

  void GiveUp(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    call_->context.TryCancel();
    FinishOnce(status);
    if (!is_reading_) RemoveHold();
  }

  void FinishOnce(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (is_finished_) return;
    is_finished_ = true;
    client_status_ = status;
    // The message that is being written belongs to gRPC until OnWriteDone.
    buffer_.erase(buffer_.begin() + (is_writing_ ? 1 : 0), buffer_.end());
    this->Finish(ToGrpcStatus(status));
  }

  void RemoveHold() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (std::exchange(is_held_, false)) call_->reader.RemoveHold();
  }

  void WatchForStall() {
    const std::weak_ptr<StreamProxy> weak = this->weak_from_this();
    executor_->PostAfter(limits_.stall_max / 8, [weak] {
      if (const std::shared_ptr<StreamProxy> self = weak.lock()) self->CheckStall();
    });
  }

  void CheckStall() {
    {
      const absl::MutexLock lock(&mu_);
      if (is_finished_) return;
      const absl::Duration stalled = Clock::Real()->Monotonic() - write_start_;
      if (is_writing_ && stalled >= limits_.stall_max) {
        GiveUp(SlowReader());
        CancelLater();
        return;
      }
    }
    WatchForStall();
  }

  void CancelLater() {
    const std::weak_ptr<StreamProxy> weak = this->weak_from_this();
    executor_->PostAfter(kSlowReaderGrace, [weak] {
      const std::shared_ptr<StreamProxy> self = weak.lock();
      if (self == nullptr) return;
      const absl::MutexLock lock(&self->mu_);
      if (!self->is_server_done_) self->server_context_->TryCancel();
    });
  }

  grpc::CallbackServerContext* const server_context_;
  ForwardedCalls* const calls_;
  const StreamLimits limits_;
  Executor* const executor_;
  const StartStream<Response> start_;
  const std::function<void(const absl::Status&)> done_;
  const GoElsewhere go_elsewhere_;  // may be null
  absl::Time deadline_;             // of the worker's calls

  absl::Mutex mu_;
  std::unique_ptr<WorkerCall> call_ ABSL_GUARDED_BY(mu_);  // the last one
  // Each side keeps the object alive until gRPC has called its OnDone.
  std::shared_ptr<StreamProxy> server_side_ ABSL_GUARDED_BY(mu_);
  std::shared_ptr<StreamProxy> worker_side_ ABSL_GUARDED_BY(mu_);
  std::deque<Response> buffer_ ABSL_GUARDED_BY(mu_);
  Response incoming_;  // of the read in flight
  bool is_reading_ ABSL_GUARDED_BY(mu_) = false;
  bool has_read_ ABSL_GUARDED_BY(mu_) = false;  // a message, from whichever worker
  bool is_writing_ ABSL_GUARDED_BY(mu_) = false;
  bool is_held_ ABSL_GUARDED_BY(mu_) = true;
  bool is_finished_ ABSL_GUARDED_BY(mu_) = false;
  bool is_server_done_ ABSL_GUARDED_BY(mu_) = false;
  absl::Duration write_start_ ABSL_GUARDED_BY(mu_);
  std::optional<absl::Status> worker_status_ ABSL_GUARDED_BY(mu_);
  std::optional<absl::Status> client_status_ ABSL_GUARDED_BY(mu_);  // once finished
};

}  // namespace

absl::Status SlowReader() {
  absl::Status status = absl::ResourceExhaustedError("the client reads too slowly");
  SetErrorInfo(status, "SLOW_READER");
  SetRetryDelay(status, kSlowReaderRetry);
  return status;
}

template <typename Response>
StreamReactor<Response>* ProxyStream(grpc::CallbackServerContext* context, ForwardedCalls* calls,
                                     absl::Duration timeout, const StreamLimits& limits,
                                     Executor* executor, const StartStream<Response>& start,
                                     std::function<void(const absl::Status&)> done,
                                     GoElsewhere go_elsewhere) {
  auto proxy = std::make_shared<StreamProxy<Response>>(context, calls, limits, executor, start,
                                                       std::move(done), std::move(go_elsewhere));
  proxy->Start(timeout);
  return proxy.get();
}

#define WALSH_PROXY_STREAM_OF(Response)                                                   \
  template StreamReactor<Response>* ProxyStream<Response>(                                \
      grpc::CallbackServerContext*, ForwardedCalls*, absl::Duration, const StreamLimits&, \
      Executor*, const StartStream<Response>&, std::function<void(const absl::Status&)>,  \
      GoElsewhere)
WALSH_PROXY_STREAM_OF(v1::GenerateStreamResponse);
WALSH_PROXY_STREAM_OF(v1::EvaluateModelResponse);
WALSH_PROXY_STREAM_OF(v1::ExportModelResponse);
WALSH_PROXY_STREAM_OF(v1::ImportModelResponse);
#undef WALSH_PROXY_STREAM_OF

}  // namespace walsh::fleet
