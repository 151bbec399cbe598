// The error report's quadratic forms on the device against their formula in double.
#include "tests/gpu/gpu_fixture.h"
#include "worker/kernels/cuda/row_forms.h"

namespace walsh::kernels::cuda {
namespace {

// Of the sum of the terms' sizes: TF32 rounds both factors of a product by up to 2^-10.
constexpr double kLimit = 2.5e-3;

// w H wᵀ, and the same with every factor's size.
struct Form {
  double value = 0;
  double size = 0;
};
Form FormOf(const double* w, const std::vector<float>& h, int64_t n) {
  Form form;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const double term = w[i] * h[i * n + j] * w[j];
      form.value += term;
      form.size += std::abs(term);
    }
  }
  return form;
}

using RowFormsGpuTest = GpuTest;

TEST_F(RowFormsGpuTest, AgreeWithTheFormula) {
  struct Shape {
    int64_t rows, cols, group_size;
  };
  for (const Shape& s : std::vector<Shape>{{0, 32, 32},
                                           {1, 1, 1},
                                           {2, 7, 7},
                                           {7, 64, 32},
                                           {31, 96, 96},
                                           {131, 257, 257},
                                           {5, 576, 64}}) {
    const std::vector<float> w = RandomNormal(s.rows * s.cols, 1);
    std::vector<float> h = RandomNormal(s.cols * s.cols, 2);
    for (int64_t i = 0; i < s.cols; ++i) {
      for (int64_t j = 0; j < i; ++j) h[i * s.cols + j] = h[j * s.cols + i];
      h[i * s.cols + i] += 4.0f;
    }
    const int64_t groups = s.cols / s.group_size;
    std::mt19937 generator(3);
    std::vector<uint8_t> codes(static_cast<size_t>(s.rows * s.cols));
    std::vector<uint8_t> zeros(static_cast<size_t>(s.rows * groups));
    for (uint8_t& c : codes) c = static_cast<uint8_t>(generator() & 15u);
    for (uint8_t& z : zeros) z = static_cast<uint8_t>(generator() & 15u);
    std::vector<float> scales = RandomNormal(s.rows * groups, 4, 0.2f);
    const auto dw = Upload(w);
    const auto dh = Upload(h);
    const auto dc = Upload(codes);
    const auto ds = Upload(scales);
    const auto dz = Upload(zeros);
    ASSERT_OK_AND_ASSIGN(const RowForms forms,
                         ComputeRowForms(context(), {.rows = s.rows,
                                                     .cols = s.cols,
                                                     .group_size = s.group_size,
                                                     .w = dw.data(),
                                                     .h = dh.data(),
                                                     .codes = dc.data(),
                                                     .scales = ds.data(),
                                                     .zeros = dz.data()}));
    ASSERT_EQ(forms.output.size(), static_cast<size_t>(s.rows));
    ASSERT_EQ(forms.error.size(), static_cast<size_t>(s.rows));
    for (int64_t r = 0; r < s.rows; ++r) {
      std::vector<double> row(static_cast<size_t>(s.cols));
      std::vector<double> difference(row.size());
      for (int64_t c = 0; c < s.cols; ++c) {
        const int64_t group = r * groups + c / s.group_size;
        const int code = codes[r * s.cols + c];
        row[c] = w[r * s.cols + c];
        difference[c] = row[c] - static_cast<double>(scales[group]) * (code - zeros[group]);
      }
      const Form output = FormOf(row.data(), h, s.cols);
      const Form error = FormOf(difference.data(), h, s.cols);
      EXPECT_NEAR(forms.output[r], output.value, kLimit * output.size) << s.cols << " " << r;
      EXPECT_NEAR(forms.error[r], error.value, kLimit * error.size) << s.cols << " " << r;
    }
  }
}

}  // namespace
}  // namespace walsh::kernels::cuda
