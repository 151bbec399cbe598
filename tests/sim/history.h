// All that has happened in a simulation, and whether it may have.
//
// The store, the artifact folders, the checkpoints, clients and workers tell what they took, did
// and were told; each is compared with the invariants at once (docs/reliability.md). The first that
// does not hold ends the run.
#pragma once

#include <deque>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "common/clock.h"
#include "server/jobs/job.h"
#include "tests/sim/fault.h"
#include "walsh/v1/model.pb.h"

namespace walsh::sim {

// What is to become of a job, whatever happens around it.
struct JobPlan {
  enum class Kind { kSucceeds, kMayPass, kFailsForEver, kKillsWorker, kNeedsBigWorker };
  Kind kind = Kind::kSucceeds;
  int n_layers = 1;
  absl::Duration layer_time = absl::Seconds(1);
  int failing_layer = 0;  // of kinds that fail
  int n_failures = 0;     // of kMayPass, then it succeeds
};

class History {
 public:
  struct Limits {
    int queued_jobs_max = 0;
    int tenant_jobs_max = 0;
  };
  History(const Clock* clock, const Limits& limits) : clock_(clock), limits_(limits) {}

  // The first violated invariant; empty: none.
  const std::string& violation() const { return violation_; }
  void Violate(std::string what);
  // One line of the trace, of which the last are kept.
  void Note(std::string_view what);
  std::string Trace() const;

  void Plan(const std::string& model_name, const JobPlan& plan) { plans_[model_name] = plan; }
  const JobPlan& PlanOf(const std::string& model_name) const { return plans_.at(model_name); }

  // -- The disk. `is_told`: the coordinator was told that this was stored.
  void OnInsert(const jobs::JobRecord& record, bool is_told);
  void OnUpdate(const jobs::JobRecord& record, const v1::QuantizationJobEvent& event,
                const v1::Model* published, bool is_told);
  void OnDelete(const std::string& id);
  // What the disk has of a job now, or nothing when it has none.
  void OnRead(const std::string& id, const std::optional<jobs::JobRecord>& record);
  void OnCoordinatorStart() { untold_.clear(); }

  // -- Clients.
  void OnSubmitted(const std::string& request_id, const v1::QuantizationJob& job);
  void OnSubmitRefused(const std::string& request_id, const absl::Status& status);
  void OnCancelled(const std::string& id);
  void OnDeleteAsked(const std::string& id) { jobs_[id].is_delete_asked = true; }

  // -- Workers ("workers/{id}").
  void OnGranted(const std::string& worker, const std::string& id, int64_t token);
  // The coordinator said OK to a report or a heartbeat with this token.
  void OnAccepted(const std::string& worker, const std::string& id, int64_t token,
                  std::string_view what);
  void OnRefused(const std::string& worker, const std::string& id) {
    jobs_[id].refused_by.insert(worker);
  }
  // Those that take jobs, when jobs are failed that all of them have refused.
  void OnWorkers(const std::set<std::string>& workers) { workers_ = workers; }
  // What the coordinator said of a completion.
  void OnCompletion(const std::string& id, int64_t token, const absl::Status& said);
  void OnCheckpoint(const std::string& worker, const std::string& id, int64_t token, int n_layers);
  // An artifact got its name in a folder.
  void OnRename(const std::string& folder, const std::string& worker, const std::string& id,
                int64_t token);
  // The worker has the artifact, and is about to say so.
  void OnResult(const std::string& worker, const std::string& id);

  Phase PhaseOfJob(const std::string& id) const;
  bool IsTerminal(const std::string& id) const;
  // Jobs that are on the disk.
  std::vector<std::string> Ids() const;
  std::vector<std::string> Unfinished() const;
  // When everything has come to rest.
  void CheckEnd(const std::string& id, const std::vector<v1::QuantizationJobEvent>& events);

  struct Figures {
    int64_t jobs = 0;
    int64_t attempts = 0;
    int64_t checkpoints = 0;
    int64_t artifacts = 0;
    // Of one job on several workers' disks: the same bytes, of which the coordinator knows one.
    int64_t second_artifacts = 0;
    // Renamed when the job's token was not the worker's any more.
    int64_t late_artifacts = 0;
    std::map<std::string, int64_t> ends;  // by state and reason

    void Add(const Figures& other);
  };
  const Figures& figures() const { return figures_; }

 private:
  struct Job {
    bool is_stored = false;
    jobs::JobRecord record;
    std::string request_id;
    bool is_submitted = false;  // its client was told
    bool is_cancelled = false;  // likewise
    bool is_delete_asked = false;
    bool has_result_artifact = false;
    int64_t checkpoint_token = 0;
    std::map<int64_t, std::string> holders;  // by token
    std::set<std::string> refused_by;
    std::set<int64_t> publishing;   // tokens whose PUBLISHING was accepted
    std::set<std::string> folders;  // that have its artifact
  };
  Job* Find(const std::string& id);
  void CheckTransition(const std::string& id, const jobs::JobRecord& before,
                       const jobs::JobRecord& after);
  void CheckProgress(const std::string& id, const v1::QuantizationJob& before,
                     const v1::QuantizationJob& after);
  void SetTold(const std::string& id, bool is_told);
  void CheckRoom(const std::string& tenant);

  const Clock* const clock_;
  const Limits limits_;
  std::string violation_;
  std::deque<std::string> trace_;
  std::map<std::string, JobPlan> plans_;          // by model name
  std::map<std::string, Job> jobs_;               // by id
  std::map<std::string, std::string> submitted_;  // job ids, by request id
  std::set<std::string> untold_;  // jobs with a last change that the coordinator does not know
  std::set<std::string> workers_;
  Figures figures_;
};

}  // namespace walsh::sim
