#include "llama/sequences.h"

#include <utility>

#include "core/fork.h"
#include "core/status.h"

namespace kvf {
namespace {

struct Contexts {
    std::mutex mutex;
    std::map<const llama_context *, std::weak_ptr<LlamaSequences>> sequences;
};

Contexts &contexts() {
    static Contexts *contexts = [] {
        auto *made = new Contexts;
        // In a forked child the attachments are the parent's, and their transfers will never end.
        on_fork([made] { made->mutex.lock(); }, [made] { made->mutex.unlock(); },
                [made] {
                    made->sequences.clear();
                    made->mutex.unlock();
                });
        return made;
    }();
    return *contexts;
}

} // namespace

std::shared_ptr<LlamaSequences> LlamaSequences::of(const llama_context *context,
                                                   const llama_model *model) {
    Contexts &all = contexts();
    std::lock_guard lock(all.mutex);
    std::erase_if(all.sequences, [](const auto &entry) { return entry.second.expired(); });
    auto &entry = all.sequences[context];
    auto found = entry.lock();
    if (!found || found->model_ != model || found->is_freed()) {
        found = std::make_shared<LlamaSequences>(model);
        entry = found;
    }
    return found;
}

void LlamaSequences::begin(const Transfer &transfer) {
    std::lock_guard lock(mutex_);
    Sequence &sequence = sequences_[transfer.sequence];
    ++(transfer.direction == Direction::Save ? sequence.saves : sequence.loads);
    if (transfer.blocking) ++blocking_;
}

void LlamaSequences::end(const Transfer &transfer, int32_t status) noexcept {
    std::lock_guard lock(mutex_);
    const auto it = sequences_.find(transfer.sequence);
    Sequence &sequence = it->second;
    --(transfer.direction == Direction::Save ? sequence.saves : sequence.loads);
    if (transfer.blocking) --blocking_;
    if (transfer.direction == Direction::Load && status != KVF_OK) sequence.to_be_emptied = true;
    drop_if_idle(it);
}

void LlamaSequences::drop_if_idle(Sequences::iterator it) noexcept {
    const Sequence &sequence = it->second;
    if (!sequence.saves && !sequence.loads && !sequence.to_be_emptied) sequences_.erase(it);
}

void LlamaSequences::check_idle(int32_t sequence, Busy busy) const {
    std::lock_guard lock(mutex_);
    const auto it = sequences_.find(sequence);
    if (it == sequences_.end()) return;
    if (it->second.loads) {
        throw Error(KVF_ERR_BUSY, format("a load into sequence %d is in flight", sequence));
    }
    if (busy == Busy::WithAny && it->second.saves) {
        throw Error(KVF_ERR_BUSY, format("a save of sequence %d is in flight", sequence));
    }
}

bool LlamaSequences::is_idle(int32_t sequence) const {
    std::lock_guard lock(mutex_);
    return !sequences_.contains(sequence);
}

void LlamaSequences::check_at_rest() const {
    std::lock_guard lock(mutex_);
    check_at_rest_locked();
}

void LlamaSequences::check_at_rest_locked() const {
    if (blocking_ == 0) return;
    throw Error(KVF_ERR_BUSY, "a transfer by libllama's blocking calls is in flight");
}

bool LlamaSequences::is_at_rest() const {
    std::lock_guard lock(mutex_);
    return blocking_ == 0;
}

std::set<int32_t> LlamaSequences::take_to_be_emptied() {
    std::lock_guard lock(mutex_);
    if (freed_) return {};
    std::set<int32_t> taken;
    for (const auto &[number, sequence] : sequences_) {
        if (sequence.to_be_emptied) taken.insert(number);
    }
    if (taken.empty()) return {};
    check_at_rest_locked();
    for (const int32_t number : taken) {
        const auto it = sequences_.find(number);
        it->second.to_be_emptied = false;
        drop_if_idle(it);
    }
    return taken;
}

void LlamaSequences::forget(int32_t sequence) {
    std::lock_guard lock(mutex_);
    const auto it = sequences_.find(sequence);
    if (it == sequences_.end()) return;
    it->second.to_be_emptied = false;
    drop_if_idle(it);
}

void LlamaSequences::note_tensors(const std::vector<uint64_t> &addresses) {
    std::lock_guard lock(mutex_);
    tensors_.insert(addresses.begin(), addresses.end());
}

std::optional<uint64_t> LlamaSequences::any_tensor() const {
    std::lock_guard lock(mutex_);
    if (tensors_.empty()) return std::nullopt;
    return *tensors_.begin();
}

bool LlamaSequences::note_buffer_freed(uint64_t begin, uint64_t bytes) {
    std::lock_guard lock(mutex_);
    const auto it = tensors_.lower_bound(begin);
    if (it == tensors_.end() || *it >= begin + bytes) return false;
    freed_ = true;
    return true;
}

bool LlamaSequences::is_freed() const {
    std::lock_guard lock(mutex_);
    return freed_;
}

} // namespace kvf
