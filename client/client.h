// The C++ client library of walsh: jobs, models and generation over gRPC.
//
// What it adds to the generated stubs: a deadline on every call; calls that met UNAVAILABLE are
// tried again with growing pauses and the same request_id, so that a job is created once; watching
// a job goes on after a lost connection or a restarted coordinator without a gap and without a
// repeated event; more streams than one HTTP/2 connection carries.
//
// Errors:  those of the service, with their details as payloads (common/grpc_status.h);
//          UNAVAILABLE when no service answers at the address, after the last attempt;
//          CANCELLED when the caller's Cancellation ended the call.
// Threads: safe; callbacks run on the calling thread.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/backoff.h"
#include "client/connection.h"
#include "common/grpc_cancellation.h"
#include "common/grpc_connection_pool.h"
#include "common/limits.h"

namespace walsh::client {

struct ClientOptions {
  std::string address;
  ChannelSecurity security;
  absl::Duration timeout = absl::Seconds(60);       // of a call, all its attempts together
  absl::Duration load_timeout = absl::Minutes(10);  // of loading and unloading a model
  int attempts_max = 5;
  Backoff::Options backoff;
  // Watching gives up when nothing came from the service for so long.
  absl::Duration watch_patience = absl::Minutes(10);
  // The service sends a heartbeat every 15 s; a stream that is silent for longer than this is dead
  // although its connection may look alive.
  absl::Duration watch_silence_max = absl::Seconds(45);
  int streams_per_connection = limits::kConcurrentStreamsMax;
};

// What a watcher wants to hear. Functions that are not set are not called.
struct WatchObserver {
  // Every event once, in order of its sequence; heartbeats as they come.
  std::function<void(const v1::QuantizationJobEvent&)> on_event;
  // The stream broke for this reason; it is tried again after `pause`.
  std::function<void(const absl::Status& reason, absl::Duration pause)> on_disconnect;
};

class Client {
 public:
  explicit Client(ClientOptions options);
  const std::string& address() const { return pool_.address(); }

  // -- Jobs. Names may be given with or without "quantizationJobs/".
  // Draws a request_id when the request has none. A job may exist although the call failed or was
  // cancelled; the same request_id finds out.
  absl::StatusOr<v1::QuantizationJob> CreateJob(v1::CreateQuantizationJobRequest request,
                                                Cancellation* cancellation = nullptr);
  absl::StatusOr<v1::QuantizationJob> GetJob(const std::string& name,
                                             Cancellation* cancellation = nullptr);
  // All pages, at most `n_jobs_max` jobs. `filter` and `order_by` as in the proto.
  absl::StatusOr<v1::ListQuantizationJobsResponse> ListJobs(const std::string& filter,
                                                            const std::string& order_by,
                                                            int n_jobs_max);
  absl::StatusOr<v1::QuantizationJob> CancelJob(const std::string& name);
  absl::Status DeleteJob(const std::string& name);
  // Follows a job from the event after `after_sequence` to its end and returns the final job.
  // DATA_LOSS when the service leaves out an event; UNAVAILABLE when nothing came from the service
  // for ClientOptions::watch_patience, not even a heartbeat.
  absl::StatusOr<v1::QuantizationJob> WatchJob(const std::string& name, int64_t after_sequence,
                                               const WatchObserver& observer,
                                               Cancellation* cancellation = nullptr);
  absl::StatusOr<v1::ListSupportedArchitecturesResponse> ListSupportedArchitectures();
  absl::StatusOr<v1::ListQuantizationPresetsResponse> ListQuantizationPresets();

  // -- Models and workers. Names may be given with or without "models/".
  absl::StatusOr<v1::ListModelsResponse> ListModels();  // all pages
  absl::StatusOr<v1::Model> GetModel(const std::string& name);
  absl::StatusOr<v1::Model> LoadModel(const std::string& name,
                                      Cancellation* cancellation = nullptr);
  absl::StatusOr<v1::Model> UnloadModel(const std::string& name,
                                        Cancellation* cancellation = nullptr);
  absl::Status DeleteModel(const std::string& name, bool force,
                           Cancellation* cancellation = nullptr);
  // `alias` with or without "aliases/". With `force` also a model that is not READY.
  absl::StatusOr<v1::ModelAlias> SetModelAlias(const std::string& alias, const std::string& model,
                                               bool force);
  absl::Status DeleteModelAlias(const std::string& alias);
  // Conversions have no deadline but the service's; `on_progress` may be empty. One that broke
  // before its first message is tried again; an export or import that is cancelled leaves nothing
  // behind.
  using OnProgress = std::function<void(const v1::ConversionProgress&)>;
  absl::StatusOr<v1::ModelExport> ExportModel(v1::ExportModelRequest request,
                                              const OnProgress& on_progress,
                                              Cancellation* cancellation = nullptr);
  absl::StatusOr<v1::Model> ImportModel(const v1::ImportModelRequest& request,
                                        const OnProgress& on_progress,
                                        Cancellation* cancellation = nullptr);
  absl::StatusOr<v1::ListWorkersResponse> ListWorkers();

  // -- Generation. Whole answers have no deadline unless `timeout` sets one.
  absl::StatusOr<v1::GenerateResponse> Generate(const v1::GenerateRequest& request,
                                                Cancellation* cancellation = nullptr,
                                                absl::Duration timeout = absl::InfiniteDuration());
  absl::StatusOr<v1::GenerateResponse> Chat(const v1::ChatRequest& request,
                                            Cancellation* cancellation = nullptr,
                                            absl::Duration timeout = absl::InfiniteDuration());
  // `on_event` sees started, deltas, finished. A stream that broke before its first event is tried
  // again; after it, the status says why it ended: nothing is generated twice.
  using OnStreamEvent = std::function<void(const v1::GenerateStreamResponse&)>;
  absl::Status GenerateStream(const v1::GenerateRequest& request, const OnStreamEvent& on_event,
                              Cancellation* cancellation = nullptr,
                              absl::Duration timeout = absl::InfiniteDuration());
  absl::Status ChatStream(const v1::ChatRequest& request, const OnStreamEvent& on_event,
                          Cancellation* cancellation = nullptr,
                          absl::Duration timeout = absl::InfiniteDuration());
  absl::StatusOr<v1::TokenizeResponse> Tokenize(const v1::TokenizeRequest& request);
  absl::StatusOr<v1::DetokenizeResponse> Detokenize(const v1::DetokenizeRequest& request);

  // Returns the result; `on_progress` may be empty. Has no deadline unless `timeout` sets one. An
  // evaluation that broke off is not begun anew.
  using OnEvaluationProgress = std::function<void(const v1::EvaluateModelResponse::Progress&)>;
  absl::StatusOr<v1::EvaluateModelResponse::Result> EvaluateModel(
      const v1::EvaluateModelRequest& request, const OnEvaluationProgress& on_progress,
      Cancellation* cancellation = nullptr, absl::Duration timeout = absl::InfiniteDuration());

  // grpc.health.v1: OK when `service` ("" is the whole server) is SERVING. One attempt.
  absl::Status CheckHealth(const std::string& service, absl::Duration timeout);

  // Connections opened so far.
  int n_connections() const { return pool_.n_connections(); }

 private:
  // One attempt of a call on a connection.
  using Attempt = std::function<grpc::Status(Connection&, grpc::ClientContext*)>;
  // Attempts until one ends with anything but UNAVAILABLE, the attempts are used up or the time is.
  // `may_retry` is asked after each failure; null means yes.
  absl::Status Retry(const Attempt& attempt, absl::Duration timeout, Cancellation* cancellation,
                     const std::function<bool()>& may_retry = nullptr);
  // The same for a deletion: what is gone at a second attempt was deleted by the first.
  absl::Status RetryDelete(const Attempt& attempt, absl::Duration timeout,
                           Cancellation* cancellation = nullptr);
  template <typename Response, typename Service, typename Request>
  absl::StatusOr<Response> Unary(std::unique_ptr<Service> Connection::*stub,
                                 grpc::Status (Service::*method)(grpc::ClientContext*,
                                                                 const Request&, Response*),
                                 const Request& request, absl::Duration timeout,
                                 Cancellation* cancellation = nullptr);
  template <typename Request>
  absl::Status Stream(std::unique_ptr<grpc::ClientReader<v1::GenerateStreamResponse>> (
                          v1::GenerationService::Stub::*method)(grpc::ClientContext*,
                                                                const Request&),
                      const Request& request, const OnStreamEvent& on_event,
                      Cancellation* cancellation, absl::Duration timeout);
  // The last message of a conversion's stream.
  template <typename Response, typename Request>
  absl::StatusOr<Response> Convert(std::unique_ptr<grpc::ClientReader<Response>> (
                                       v1::ModelService::Stub::*method)(grpc::ClientContext*,
                                                                        const Request&),
                                   const Request& request, const OnProgress& on_progress,
                                   Cancellation* cancellation);
  struct WatchResult {
    absl::Status status;     // why the stream ended
    bool delivered = false;  // anything, heartbeats too
    bool finished = false;   // an event with a terminal state
  };
  // One Watch stream from *last_sequence on; advances it.
  WatchResult WatchOnce(const std::string& name, const WatchObserver& observer,
                        Cancellation* cancellation, int64_t* last_sequence);
  // Converts, and says in plain words that nobody answers at the address.
  absl::Status ToStatus(const grpc::Status& status) const;

  const ClientOptions options_;
  ConnectionPool<Connection> pool_;
};

// True for SUCCEEDED, FAILED and CANCELLED.
bool IsTerminal(v1::QuantizationJob::State state);
// A random id of 32 hexadecimal digits.
std::string NewRequestId();

}  // namespace walsh::client
