// write_tiny_model FOLDER: TinyModel's Hugging Face directory, for tests that are no C++.
#include "tests/testing/tiny_model.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  walsh::testing::TinyModel({}).WriteHf(argv[1]);
  return 0;
}
