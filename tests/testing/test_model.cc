#include "tests/testing/test_model.h"

#include <fstream>

#include "tests/testing/tiny_model.h"

namespace walsh::testing {

TestModel::TestModel() {
  path_ = TestData("models/TinyStories-656K");
  text_path_ = TestData("corpora/tinystories-train-1000.json");
  is_real_ = !path_.empty() && !text_path_.empty();
  if (is_real_) {
    root_ = TestDataDir();
    n_layers_ = 2;
    return;
  }
  if (DataIsRequired()) ADD_FAILURE() << "no TinyStories-656K (set WALSH_TEST_DATA)";
  root_ = dir_.path();
  path_ = dir_ / "tiny";
  text_path_ = dir_ / "text.txt";
  // So many layers that a test meets a job in its midst.
  n_layers_ = 8;
  TinyModel({.hidden = 128,
             .intermediate = 256,
             .n_layers = n_layers_,
             .head_dim = 32,
             .max_position = 512})
      .WriteHf(path_);
  std::ofstream text(text_path_, std::ios::binary);
  for (int i = 0; i < 10'000; ++i) {
    text << "Sentence number " << i << " says that " << i * 7 << " is seven times as much. ";
  }
}

}  // namespace walsh::testing
