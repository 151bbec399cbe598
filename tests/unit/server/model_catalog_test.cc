#include "server/fleet/model_catalog.h"

#include <cerrno>
#include <string>
#include <vector>

#include "server/jobs/sqlite_job_store.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/unit/server/faulty_disk.h"

namespace walsh::fleet {
namespace {

using v1::Model;
using ::walsh::testing::FaultyDisk;
using ::walsh::testing::HasCode;
using ::walsh::testing::IsOk;

class ModelCatalogTest : public ::testing::Test {
 protected:
  ModelCatalogTest() { Restart(); }
  void Restart() {
    catalog_.reset();
    store_.reset();
    store_ = *jobs::SqliteJobStore::Open(dir_ / "jobs.db", &clock_);
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
  std::unique_ptr<jobs::SqliteJobStore> store_;
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

}  // namespace
}  // namespace walsh::fleet
