//! Who goes on: each step of each task is chosen by a seed. Tasks belong to *lives*, each one process: a life that is cut off never
//! takes another step, wherever its tasks stand.
//!
//! ```text
//! operator:  starts and ends lives; sleeps for so many steps, and then goes first
//! clock:     goes on when nobody else can, and now and then all the same: to the next moment that anybody waits for
//! others:    the one that went last, or anybody, by weights that are thrown for each
//! ```

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::time::Duration;

use shuttle::scheduler::{Schedule, Scheduler, Task, TaskId};

use super::dice::Dice;
use crate::sync::virtual_time;

/// A step takes so long.
const STEP: Duration = Duration::from_micros(2);
/// A seed that takes more steps does not end.
const STEPS_MAX: u64 = 4_000_000;

/// The life of the operator and the clock, which nothing ends.
const IMMORTAL: u32 = 0;

#[derive(Default)]
struct State {
    dice: Option<Dice>,
    steps: u64,
    /// The life and the weight of each task, by its number.
    tasks: Vec<(u32, u64)>,
    dead: BTreeSet<u32>,
    /// Whose life it is that the operator starts.
    spawning: u32,
    /// When the operator goes on.
    wake_at: u64,
    /// In percent: the task that went last goes on.
    stickiness: u64,
    /// One step in so many is the clock's.
    pace: u64,
    finished: bool,
    /// A hash of all that was chosen and done.
    trace: u64,
}

thread_local!(static STATE: RefCell<State> = RefCell::default());

fn with<T>(look: impl FnOnce(&mut State) -> T) -> T {
    STATE.with(|state| look(&mut state.borrow_mut()))
}

/// The tasks that are there from the start.
const OPERATOR: usize = 0;
const CLOCK: usize = 1;

/// What came of the seed that ran last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) finished: bool,
    pub(super) steps: u64,
    pub(super) trace: u64,
}

pub(super) fn outcome() -> Outcome {
    with(|state| Outcome { finished: state.finished, steps: state.steps, trace: state.trace })
}

/// For the operator: begins a seed. Spawns the clock.
pub(super) fn begin() {
    virtual_time::start();
    drop(shuttle::thread::spawn(|| {
        loop {
            shuttle::thread::yield_now();
            if !virtual_time::advance(is_alive) {
                // Nothing will happen any more: that is the operator's.
                with(|state| state.wake_at = state.steps);
            }
        }
    }));
}

/// For the operator: the seed is over. Nobody takes another step.
pub(super) fn finish() {
    with(|state| state.finished = true);
    virtual_time::stop();
    shuttle::thread::yield_now();
}

fn is_alive(task: usize) -> bool {
    with(|state| state.tasks.get(task).is_none_or(|(life, _)| !state.dead.contains(life)))
}

/// For the operator: starts a task of life `life`.
pub(super) fn spawn(life: u32, body: impl FnOnce() + Send + 'static) {
    with(|state| state.spawning = life);
    drop(shuttle::thread::spawn(move || {
        let task = usize::from(shuttle::thread::current().id());
        // It may have been seen first when another life had begun, and this one had ended.
        let dead = with(|state| {
            state.tasks[task].0 = life;
            state.dead.contains(&life)
        });
        if !dead {
            body();
        }
    }));
}

/// For the operator: life `life` takes no further step.
pub(super) fn cut_off(life: u32) {
    with(|state| state.dead.insert(life));
}

/// For the operator: lets the others take so many steps, or as many as they can.
pub(super) fn wait(steps: u64) {
    with(|state| state.wake_at = state.steps + steps);
    while with(|state| state.steps < state.wake_at) {
        shuttle::thread::park();
    }
}

/// The life that the calling task belongs to.
pub(super) fn life() -> u32 {
    let task = usize::from(shuttle::thread::current().id());
    with(|state| state.tasks[task].0)
}

pub(super) fn steps() -> u64 {
    with(|state| state.steps)
}

/// A place where another task may go on.
pub(super) fn pause() {
    shuttle::thread::sleep(Duration::ZERO);
}

/// Adds to the hash of what was done.
pub(super) fn trace(word: u64) {
    with(|state| state.trace = (state.trace.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95));
}

/// Chooses for one seed after the other.
pub(super) struct Seeds<I>(pub(super) I);

impl<I: Iterator<Item = u64>> Scheduler for Seeds<I> {
    fn new_execution(&mut self) -> Option<Schedule> {
        let seed = self.0.next()?;
        let mut dice = Dice::new(seed ^ 0x5c4e_d01e);
        let stickiness = dice.pick(&[0, 50, 80, 90, 95]);
        let pace = dice.pick(&[40, 150, 600]);
        with(|state| *state = State { dice: Some(dice), stickiness, pace, ..State::default() });
        Some(Schedule::new(seed))
    }

    fn next_task(&mut self, runnable: &[&Task], current: Option<TaskId>, yielding: bool) -> Option<TaskId> {
        virtual_time::pass(STEP);
        with(|state| state.next_task(runnable, current, yielding))
    }

    fn next_u64(&mut self) -> u64 {
        with(|state| state.dice.as_mut().map_or(0, Dice::next))
    }
}

impl State {
    fn next_task(&mut self, tasks: &[&Task], current: Option<TaskId>, yielding: bool) -> Option<TaskId> {
        self.steps += 1;
        if self.finished || self.steps > STEPS_MAX {
            return None;
        }
        let mut dice = self.dice.take()?;
        tasks.iter().for_each(|task| self.learn(task, &mut dice));
        let chosen = self.choose(tasks, current.filter(|_| !yielding), &mut dice);
        self.dice = Some(dice);
        let number = chosen.map_or(u64::MAX, |task| usize::from(task) as u64);
        self.trace = (self.trace.rotate_left(5) ^ number).wrapping_mul(0x517c_c1b7_2722_0a95);
        chosen
    }

    /// Gives a task that is new its life.
    fn learn(&mut self, task: &Task, dice: &mut Dice) {
        let number = usize::from(task.id());
        if number < self.tasks.len() {
            return;
        }
        let parent = task.parent_task_id().map(usize::from);
        let life = match (number, parent) {
            (OPERATOR | CLOCK, _) | (_, None) => IMMORTAL,
            (_, Some(OPERATOR)) => self.spawning,
            (_, Some(parent)) => self.tasks[parent].0,
        };
        // Tasks are seen in the order of their numbers, and all of them that can run.
        self.tasks.resize(number + 1, (life, dice.pick(&[1, 4, 4, 16])));
    }

    fn choose(&self, tasks: &[&Task], current: Option<TaskId>, dice: &mut Dice) -> Option<TaskId> {
        let number = |task: &Task| usize::from(task.id());
        let operator = tasks.iter().find(|task| number(task) == OPERATOR);
        if let Some(operator) = operator.filter(|task| task.runnable() || self.steps >= self.wake_at) {
            return Some(operator.id());
        }
        let clock = tasks.iter().find(|task| number(task) == CLOCK).map(|task| task.id());
        if clock.is_some() && dice.below(self.pace) == 0 {
            return clock;
        }
        let others = || {
            tasks.iter().filter(|task| {
                let number = number(task);
                number > CLOCK && task.runnable() && !self.dead.contains(&self.tasks[number].0)
            })
        };
        if let Some(current) = current.filter(|current| others().any(|task| task.id() == *current)) {
            if dice.percent(self.stickiness) {
                return Some(current);
            }
        }
        let total: u64 = others().map(|task| self.tasks[number(task)].1).sum();
        if total == 0 {
            return clock;
        }
        let mut left = dice.below(total);
        let chosen = others().find(|task| {
            let weight = self.tasks[number(task)].1;
            let found = left < weight;
            left = left.saturating_sub(weight);
            found
        });
        chosen.map(|task| task.id())
    }
}
