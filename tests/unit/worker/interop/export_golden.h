// Matrices in tests/golden/interop/export_formats.bin as other programs store them.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "tests/testing/golden.h"
#include "worker/tensor/half.h"
#include "worker/tensor/quantized_matrix.h"

namespace walsh::interop {

struct ExportGolden {
  QuantizedMatrix matrix;
  std::string weight_packed;
  std::string weight_zero_point;
  std::string v1_qzeros;
  uint32_t ggml_type = 0;
  std::string blocks;  // empty where no type of ggml holds it
};

inline std::vector<ExportGolden> ReadExportGoldens() {
  const std::string file = testing::GoldenFile("interop/export_formats.bin");
  EXPECT_FALSE(file.empty());
  std::string_view rest = file;
  const auto take = [&rest](size_t n) {
    const std::string bytes(rest.substr(0, n));
    rest.remove_prefix(n);
    return bytes;
  };
  const auto take_u32 = [&take] {
    uint32_t value = 0;
    std::memcpy(&value, take(sizeof(value)).data(), sizeof(value));
    return value;
  };
  std::vector<ExportGolden> goldens;
  while (!rest.empty()) {
    ExportGolden golden;
    QuantizedMatrix& m = golden.matrix;
    m.bits = static_cast<int>(take_u32());
    m.rows = take_u32();
    m.cols = take_u32();
    m.group_size = take_u32();
    const std::string codes = take(static_cast<size_t>(m.rows * m.cols));
    m.codes.assign(codes.begin(), codes.end());
    const std::string zeros = take(static_cast<size_t>(m.rows * m.groups()));
    m.zeros.assign(zeros.begin(), zeros.end());
    for (size_t i = 0; i < m.zeros.size(); ++i) {
      uint16_t half = 0;
      std::memcpy(&half, take(sizeof(half)).data(), sizeof(half));
      m.scales.push_back(HalfToFloat(half));
    }
    golden.weight_packed = take(take_u32());
    golden.weight_zero_point = take(take_u32());
    golden.v1_qzeros = take(take_u32());
    golden.ggml_type = take_u32();
    golden.blocks = take(take_u32());
    goldens.push_back(std::move(golden));
  }
  return goldens;
}

}  // namespace walsh::interop
