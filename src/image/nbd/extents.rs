//! What a server said of the extents ahead, until something there changes.
//!
//! One question covers [`AHEAD_BYTES`]. A change forgets what is known of its place before it is sent and again after it was answered,
//! and spoils the question under way there: so nothing is remembered that was true before a change only (rule 3).

use std::collections::VecDeque;

use crate::image::{Extent, ExtentStatus};
use crate::range::ByteRange;
use crate::sync::Mutex;
use crate::sys::libnbd::{STATE_HOLE, STATE_ZERO};

/// How far one question looks ahead.
pub(super) const AHEAD_BYTES: u64 = 256 << 20;
/// ... of one who looks at less than that.
pub(super) const AHEAD_LITTLE_BYTES: u64 = 16 << 20;
/// As many questions under way are remembered; more are not.
const QUESTIONS_MAX: usize = 16;
/// As many answers are: the scan's, and those of some copiers.
const ANSWERS_MAX: usize = 4;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Extents {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The latest answers, the newest last.
    known: VecDeque<Vec<Extent>>,
    questions: Vec<(u64, ByteRange)>,
    next: u64,
}

/// A question under way; `None`: its answer will not be remembered.
#[must_use]
pub(super) struct Question(Option<u64>);

impl Extents {
    /// What is known of `offset`, from there on.
    pub(super) fn at(&self, offset: u64) -> Option<Extent> {
        let state = self.state.lock();
        let mut all = state.known.iter().flatten();
        let known = all.find(|known| known.range.start() <= offset && offset < known.range.end())?;
        Some(Extent { range: ByteRange::from_bounds(offset, known.range.end()), status: known.status })
    }

    /// A question about `range` is sent.
    pub(super) fn ask(&self, range: ByteRange) -> Question {
        let mut state = self.state.lock();
        if state.questions.len() >= QUESTIONS_MAX {
            return Question(None);
        }
        let number = state.next;
        state.next += 1;
        state.questions.push((number, range));
        Question(Some(number))
    }

    /// Its answer.
    pub(super) fn learn(&self, question: Question, answer: Vec<Extent>) {
        let mut state = self.state.lock();
        let asked = state.questions.len();
        state.questions.retain(|(number, _)| Some(*number) != question.0);
        if state.questions.len() < asked {
            if state.known.len() >= ANSWERS_MAX {
                state.known.pop_front();
            }
            state.known.push_back(answer);
        }
    }

    /// Something in `range` changes.
    pub(super) fn forget(&self, range: ByteRange) {
        let mut state = self.state.lock();
        state.questions.retain(|(_, asked)| !asked.overlaps(range));
        for answer in &mut state.known {
            answer.retain(|known| !known.range.overlaps(range));
        }
    }
}

/// The extents of an answer about `range`, at most up to `size_bytes`; those in a row with one status are one.
pub(super) fn from_answer(range: ByteRange, answer: &[(u32, u32)], size_bytes: u64) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    let mut at = range.start();
    for (len, flags) in answer {
        let part = ByteRange::from_bounds(at, at.saturating_add((*len).into()).min(size_bytes));
        // Not allocated alone does not say what is read there.
        let status = match (flags & STATE_HOLE != 0, flags & STATE_ZERO != 0) {
            (true, true) => ExtentStatus::Hole,
            (false, true) => ExtentStatus::Zero,
            (_, false) => ExtentStatus::Data,
        };
        at = part.end();
        match extents.last_mut() {
            _ if part.is_empty() => (),
            Some(last) if last.status == status => {
                last.range = ByteRange::from_bounds(last.range.start(), part.end());
            }
            _ => extents.push(Extent { range: part, status }),
        }
    }
    extents
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    const HOLE: u32 = STATE_HOLE | STATE_ZERO;

    #[test]
    fn only_what_is_said_to_be_zero_is() {
        let answer = [(10, 0), (10, STATE_HOLE), (10, STATE_ZERO), (10, HOLE), (0, 0), (100, HOLE)];
        let extents = from_answer(ByteRange::new(100, 40), &answer, 150);
        let found: Vec<_> = extents.iter().map(|one| (one.range.start(), one.range.end(), one.status)).collect();
        assert_eq!(
            found,
            [(100, 120, ExtentStatus::Data), (120, 130, ExtentStatus::Zero), (130, 150, ExtentStatus::Hole)]
        );
    }

    #[test]
    fn a_change_forgets_what_was_known_and_what_is_being_asked() {
        let extents = Extents::default();
        let range = ByteRange::new(0, 100);
        let hole = || from_answer(range, &[(50, HOLE), (50, 0)], 100);
        let question = extents.ask(range);
        extents.learn(question, hole());
        assert_eq!(extents.at(20).unwrap().range, ByteRange::from_bounds(20, 50));
        extents.forget(ByteRange::new(40, 1));
        assert!(extents.at(20).is_none(), "the hole is no hole any more");
        assert_eq!(extents.at(60).unwrap().status, ExtentStatus::Data);
        // Asked before the change, answered after it.
        let question = extents.ask(range);
        extents.forget(ByteRange::new(40, 1));
        extents.learn(question, hole());
        assert!(extents.at(20).is_none());
    }
}
