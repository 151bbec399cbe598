#include "server/fleet/model_catalog.h"

#include <cerrno>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/notification.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "server/jobs/sql_job_store.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/unit/server/faulty_disk.h"

namespace walsh::fleet {
namespace {

using ::testing::HasSubstr;
using v1::Model;
using ::walsh::testing::FaultyDisk;
using ::walsh::testing::HasCode;
using ::walsh::testing::IsOk;
using ::walsh::testing::StatusIs;

class ModelCatalogTest : public ::testing::Test {
 protected:
  ModelCatalogTest() { Restart(); }
  void Restart() {
    catalog_.reset();
    store_.reset();
    store_ = *jobs::SqlJobStore::OpenSqlite(dir_ / "jobs.db", &clock_);
    catalog_ = *ModelCatalog::Open(store_.get(), &registry_, &clock_);
  }
  static ModelCatalog::Models Models(const std::vector<std::string>& ids) {
    ModelCatalog::Models models;
    for (const std::string& id : ids) {
      Model* model = models.Add();
      model->set_name("models/" + id);
      model->set_sha256("hash of " + id);
      model->set_state(Model::READY);
      model->set_worker("workers/w");
    }
    return models;
  }

  testing::TempDir dir_;
  ManualClock clock_;
  WorkerRegistry registry_{&clock_, {}};
  std::unique_ptr<jobs::SqlJobStore> store_;
  std::unique_ptr<ModelCatalog> catalog_;
};

TEST_F(ModelCatalogTest, LearnsOnceAndRemembersAcrossARestart) {
  const ModelCatalog::Models models = Models({"a", "b"});
  EXPECT_TRUE(catalog_->HasNews(models));
  ASSERT_OK(catalog_->Learn(models));
  EXPECT_FALSE(catalog_->HasNews(models));
  Restart();
  EXPECT_FALSE(catalog_->HasNews(models));
  ASSERT_OK_AND_ASSIGN(const Model model, catalog_->Get("a"));
  EXPECT_EQ(model.sha256(), "hash of a");
  EXPECT_EQ(model.state(), Model::UNLOADED) << "no worker says otherwise";
  EXPECT_EQ(model.worker(), "");
  EXPECT_THAT(catalog_->Get("c"), HasCode(absl::StatusCode::kNotFound));
}

TEST_F(ModelCatalogTest, ModelsWithBadNamesAreNotLearnt) {
  EXPECT_FALSE(catalog_->HasNews(Models({"../x", "A", ""})));
}

TEST_F(ModelCatalogTest, DeletedModelIsNotBroughtBackByALateHeartbeat) {
  ASSERT_OK(catalog_->Learn(Models({"a"})));
  ASSERT_OK(catalog_->Forget("a"));
  EXPECT_FALSE(catalog_->Knows("a"));
  EXPECT_FALSE(catalog_->HasNews(Models({"a"})));
  clock_.Advance(absl::Minutes(1));
  EXPECT_TRUE(catalog_->HasNews(Models({"a"}))) << "it is really there";
  ASSERT_OK(catalog_->Forget("a"));
  catalog_->Publish(Models({"a"})[0]);
  EXPECT_TRUE(catalog_->Knows("a")) << "a new job made it again";
}

TEST_F(ModelCatalogTest, ListPages) {
  ASSERT_OK(catalog_->Learn(Models({"a", "b", "c"})));
  EXPECT_EQ(catalog_->List("", 2).size(), 2u);
  const std::vector<Model> rest = catalog_->List("b", 2);
  ASSERT_EQ(rest.size(), 1u);
  EXPECT_EQ(rest[0].name(), "models/c");
}

TEST_F(ModelCatalogTest, FullDiskLearnsLater) {
  {
    FaultyDisk disk;
    disk.FailWrites(ENOSPC);
    EXPECT_THAT(catalog_->Learn(Models({"a"})), HasCode(absl::StatusCode::kResourceExhausted));
    EXPECT_FALSE(catalog_->Knows("a"));
  }
  EXPECT_OK(catalog_->Learn(Models({"a"})));
}

// -- Aliases

TEST_F(ModelCatalogTest, AnAliasMeansTheModelThatItPointsAtAcrossARestart) {
  ASSERT_OK(catalog_->Learn(Models({"a", "b"})));
  EXPECT_THAT(catalog_->Resolve("prod"), HasCode(absl::StatusCode::kNotFound));
  ASSERT_OK_AND_ASSIGN(const v1::ModelAlias alias, catalog_->SetAlias("prod", "a", true));
  EXPECT_EQ(alias.name(), "aliases/prod");
  EXPECT_EQ(alias.model(), "models/a");
  EXPECT_EQ(*catalog_->Resolve("prod"), "a");
  EXPECT_EQ(*catalog_->Resolve("b"), "b");
  EXPECT_EQ(catalog_->Get("a")->aliases(0), "prod");
  ASSERT_OK(catalog_->SetAlias("prod", "b", true));
  ASSERT_OK(catalog_->SetAlias("best", "b", true));
  Restart();
  EXPECT_EQ(*catalog_->Resolve("prod"), "b");
  EXPECT_EQ(catalog_->Get("a")->aliases_size(), 0);
  const std::vector<Model> models = catalog_->List("", 9);
  EXPECT_EQ(models[0].aliases_size(), 0);
  ASSERT_EQ(models[1].aliases_size(), 2);
  EXPECT_EQ(models[1].aliases(0), "best");
  EXPECT_EQ(models[1].aliases(1), "prod");
  ASSERT_OK(catalog_->DeleteAlias("prod"));
  EXPECT_THAT(catalog_->Resolve("prod"), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(catalog_->DeleteAlias("prod"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("alias 'prod'")));
}

// Whoever switches an alias may unload the model of before at once: no request is on its way there.
TEST_F(ModelCatalogTest, AnAliasMovesBeforeARequestIsSentOrAfter) {
  ASSERT_OK(catalog_->Learn(Models({"a", "b"})));
  ASSERT_OK(catalog_->SetAlias("prod", "a", true));
  absl::Notification is_moved;
  std::thread mover;
  std::string sent_to;
  ASSERT_OK(catalog_->ForModel("prod", [&](const std::string& id) {
    mover = std::thread([&] {
      EXPECT_OK(catalog_->SetAlias("prod", "b", true));
      is_moved.Notify();
    });
    EXPECT_FALSE(is_moved.WaitForNotificationWithTimeout(absl::Milliseconds(100)));
    sent_to = id;
    return absl::OkStatus();
  }));
  mover.join();
  EXPECT_EQ(sent_to, "a");
  EXPECT_EQ(*catalog_->Resolve("prod"), "b");
  EXPECT_THAT(catalog_->ForModel("nobody", [](const std::string&) { return absl::OkStatus(); }),
              HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(catalog_->ForModel("a", [](const auto&) { return absl::AbortedError("full"); }),
              HasCode(absl::StatusCode::kAborted));
}

TEST_F(ModelCatalogTest, AliasesThatCannotBeAreRefused) {
  ASSERT_OK(catalog_->Learn(Models({"a", "b"})));
  ASSERT_OK(catalog_->SetAlias("prod", "a", true));
  const auto refusal = [&](const std::string& alias, const std::string& model) {
    return catalog_->SetAlias(alias, model, true).status();
  };
  EXPECT_THAT(refusal("x", "nobody"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("model 'nobody'")));
  EXPECT_THAT(refusal("a", "b"), StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("'a'")));
  EXPECT_THAT(refusal("x", "prod"),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("an alias of model 'a'")));
  EXPECT_EQ(ErrorReason(refusal("prod", "prod")), "ALIAS_OF_ALIAS");
  const absl::Status unloaded = catalog_->SetAlias("prod", "b", false).status();
  EXPECT_THAT(unloaded, StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("UNLOADED")));
  EXPECT_EQ(*catalog_->Resolve("prod"), "a") << "as before";
  EXPECT_THAT(catalog_->CheckIsModel("prod"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("alias of model 'a'")));
  EXPECT_OK(catalog_->CheckIsModel("a"));
}

TEST_F(ModelCatalogTest, AModelIsDeletedOrPointedAtNeverBoth) {
  ASSERT_OK(catalog_->Learn(Models({"a", "b"})));
  ASSERT_OK(catalog_->SetAlias("prod", "a", true));
  EXPECT_THAT(catalog_->BeginDelete("a"),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("alias 'prod'")));
  ASSERT_OK(catalog_->BeginDelete("b"));
  EXPECT_EQ(ErrorReason(catalog_->SetAlias("prod", "b", true).status()), "MODEL_DELETING");
  catalog_->EndDelete("b");
  ASSERT_OK(catalog_->SetAlias("prod", "b", true));
  ASSERT_OK(catalog_->BeginDelete("a"));
}

TEST_F(ModelCatalogTest, AnImportAndAnAliasNeverGetOneName) {
  ASSERT_OK(catalog_->Learn(Models({"a"})));
  ASSERT_OK(catalog_->SetAlias("prod", "a", true));
  for (const char* taken : {"a", "prod"}) {
    const absl::Status refused = catalog_->BeginImport(taken);
    EXPECT_THAT(refused, StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("is taken by")));
    EXPECT_EQ(ErrorReason(refused), "NAME_TAKEN");
  }
  ASSERT_OK(catalog_->BeginImport("b"));
  EXPECT_EQ(ErrorReason(catalog_->BeginImport("b")), "NAME_TAKEN") << "another one";
  EXPECT_THAT(catalog_->SetAlias("b", "a", true),
              StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("being imported")));
  catalog_->EndImport("b", /*is_published=*/true);
  EXPECT_EQ(ErrorReason(catalog_->SetAlias("b", "a", true).status()), "NAME_TAKEN")
      << "its worker has not told of it yet";
  ASSERT_OK(catalog_->Learn(Models({"b"})));
  EXPECT_EQ(ErrorReason(catalog_->SetAlias("b", "a", true).status()), "NAME_TAKEN") << "a model";

  ASSERT_OK(catalog_->BeginImport("c"));
  catalog_->EndImport("c", /*is_published=*/false);
  EXPECT_OK(catalog_->SetAlias("c", "a", true)) << "nothing came of it";
  ASSERT_OK(catalog_->BeginImport("d"));
  catalog_->EndImport("d", /*is_published=*/true);
  clock_.Advance(absl::Minutes(1));
  EXPECT_OK(catalog_->SetAlias("d", "a", true)) << "its worker is gone, and the model with it";
  ASSERT_OK(catalog_->DeleteAlias("d"));
  EXPECT_OK(catalog_->BeginImport("d"));
}

TEST_F(ModelCatalogTest, AnAliasThatIsNotStoredIsNotThere) {
  ASSERT_OK(catalog_->Learn(Models({"a", "b"})));
  ASSERT_OK(catalog_->SetAlias("prod", "a", true));
  FaultyDisk disk;
  disk.FailWrites(ENOSPC);
  EXPECT_FALSE(catalog_->SetAlias("prod", "b", true).ok());
  EXPECT_FALSE(catalog_->DeleteAlias("prod").ok());
  EXPECT_EQ(*catalog_->Resolve("prod"), "a");
}

TEST_F(ModelCatalogTest, AliasesAreLimited) {
  ASSERT_OK(catalog_->Learn(Models({"a"})));
  for (int i = 0; i < limits::kAliasesMax; ++i) {
    ASSERT_OK(catalog_->SetAlias("x" + std::to_string(i), "a", true));
  }
  EXPECT_THAT(catalog_->SetAlias("y", "a", true),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("1000")));
  EXPECT_OK(catalog_->SetAlias("x7", "a", true)) << "it is there";
}

// A worker's data folder may come from elsewhere.
TEST_F(ModelCatalogTest, AnAliasGoesBeforeAModelThatCameLater) {
  ASSERT_OK(catalog_->Learn(Models({"a"})));
  ASSERT_OK(catalog_->SetAlias("prod", "a", true));
  ASSERT_OK(catalog_->Learn(Models({"prod"})));
  EXPECT_EQ(*catalog_->Resolve("prod"), "a");
  EXPECT_EQ(ErrorReason(catalog_->SetAlias("x", "prod", true).status()), "ALIAS_OF_ALIAS");
  EXPECT_OK(catalog_->CheckIsModel("prod")) << "it can be deleted";
  ASSERT_OK(catalog_->DeleteAlias("prod"));
  EXPECT_EQ(*catalog_->Resolve("prod"), "prod");
}

}  // namespace
}  // namespace walsh::fleet
