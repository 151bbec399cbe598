// The merge loop of byte pair encoding: repeatedly joins the best pair of neighbours.
//
// One loop serves both families: GPT-2's (the pair's rank in the merge list) and SentencePiece's
// (the score of the joined piece). Best is the lowest rank, then the leftmost pair. A heap of
// candidates with lazy deletion takes O(n log n); the loop over all pairs that many programs have
// takes O(n²), which a prompt of one repeated character turns into minutes.
//
// Source:  Sennrich et al. 2016 (arXiv 1508.07909), section 3.2.
// Threads: distinct scratch space for each thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace walsh {

struct BpeSymbol {
  int32_t id = -1;  // token; −1: none
  uint32_t begin = 0;
  uint32_t size = 0;  // bytes; 0: merged into a symbol on its left
  int32_t previous = -1;
  int32_t next = -1;
};

struct BpeMerge {
  uint32_t rank = 0;
  int32_t id = -1;  // of the joined token
};

struct BpeCandidate {
  uint64_t order;  // rank, then the index of the left symbol: the lowest is best
  uint32_t size;   // of both symbols; another value later means that the candidate is stale
  int32_t id;

  int32_t left() const { return static_cast<int32_t>(static_cast<uint32_t>(order)); }
};

// Reused from word to word, so that a short word allocates nothing.
struct BpeScratch {
  std::vector<BpeSymbol> symbols;
  std::vector<BpeCandidate> heap;

  void Add(int32_t id, uint32_t begin, uint32_t size) {
    const int32_t index = static_cast<int32_t>(symbols.size());
    if (index > 0) symbols.back().next = index;
    symbols.push_back({.id = id, .begin = begin, .size = size, .previous = index - 1, .next = -1});
  }
};

// Joins neighbours in scratch.symbols until `find_merge(left, right)` (a std::optional<BpeMerge>)
// knows no pair. What is left are the symbols with size > 0, in order.
template <typename FindMerge>
void MergeSymbols(BpeScratch& scratch, const FindMerge& find_merge) {
  std::vector<BpeSymbol>& symbols = scratch.symbols;
  std::vector<BpeCandidate>& heap = scratch.heap;
  const auto is_worse = [](const BpeCandidate& a, const BpeCandidate& b) {
    return a.order > b.order;
  };
  const auto push = [&](int32_t left) {
    const BpeSymbol& a = symbols[left];
    const BpeSymbol& b = symbols[a.next];
    const std::optional<BpeMerge> merge = find_merge(a, b);
    if (!merge) return false;
    heap.push_back({.order = uint64_t{merge->rank} << 32 | static_cast<uint32_t>(left),
                    .size = a.size + b.size,
                    .id = merge->id});
    return true;
  };

  heap.clear();
  for (int32_t i = 0; i + 1 < static_cast<int32_t>(symbols.size()); ++i) push(i);
  std::make_heap(heap.begin(), heap.end(), is_worse);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), is_worse);
    const BpeCandidate best = heap.back();
    heap.pop_back();
    BpeSymbol& left = symbols[best.left()];
    // Symbols only grow, so the extent tells whether both are still those of the candidate.
    if (left.size == 0 || left.next < 0 || left.size + symbols[left.next].size != best.size) {
      continue;
    }
    BpeSymbol& right = symbols[left.next];
    left.id = best.id;
    left.size = best.size;
    left.next = right.next;
    right.size = 0;
    if (left.next >= 0) symbols[left.next].previous = best.left();
    if (left.previous >= 0 && push(left.previous)) {
      std::push_heap(heap.begin(), heap.end(), is_worse);
    }
    if (left.next >= 0 && push(best.left())) std::push_heap(heap.begin(), heap.end(), is_worse);
  }
}

}  // namespace walsh
