// A source model and text for end-to-end tests: TinyStories-656K where the test data is, else a
// small random model, so that a fresh clone runs the same tests.
#pragma once

#include <string>
#include <vector>

#include "tests/testing/test_data.h"

namespace walsh::testing {

class TestModel {
 public:
  TestModel();
  // A model that has learnt something; a random one's figures and text mean nothing.
  bool is_real() const { return is_real_; }
  const std::string& path() const { return path_; }
  const std::string& text_path() const { return text_path_; }  // of 65,536 tokens or more
  const std::string& root() const { return root_; }            // both are under it
  int n_layers() const { return n_layers_; }

 private:
  const TempDir dir_;
  bool is_real_ = false;
  std::string path_;
  std::string text_path_;
  std::string root_;
  int n_layers_ = 0;
};

}  // namespace walsh::testing
