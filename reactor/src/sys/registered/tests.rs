//! Short, late and failed submissions, with a scripted ring.

#![allow(clippy::unwrap_used)] // Tests and their helpers may unwrap.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

use super::*;
use crate::config::FileTable;
use crate::sys::sockets::choose_tables;
use crate::token::Token;

const ENTRIES: u32 = 4;
const PLACES: u32 = 16;

/// The outcome of one submission.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// This number of operations is accepted, and they complete at once.
    Take(usize),
    /// All operations are accepted, and none completes.
    Hold,
    /// All operations are accepted, and all that are held complete, the last one first.
    Backwards,
    /// No operation is accepted.
    Fail(Errno),
}

thread_local! {
    static SCRIPT: RefCell<VecDeque<Step>> = const { RefCell::new(VecDeque::new()) };
    static SUBMISSIONS: Cell<usize> = const { Cell::new(0) };
    static SET_UP: Cell<Option<Errno>> = const { Cell::new(None) };
    static UPDATE_MAX: Cell<usize> = const { Cell::new(usize::MAX) };
    static OPEN: Cell<usize> = const { Cell::new(0) };
    static LINES: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

fn script(steps: impl IntoIterator<Item = Step>) {
    SUBMISSIONS.set(0);
    SCRIPT.with_borrow_mut(|script| script.extend(steps));
}

/// After the script, all operations are accepted and complete in order. The result of each is 1000 plus its number.
struct ScriptedRing {
    entries: usize,
    queued: VecDeque<u64>,
    held: VecDeque<u64>,
    completed: Vec<(u64, i32)>,
}

impl ScriptedRing {
    fn take(&mut self, most: usize) -> usize {
        let taken = self.queued.len().min(most);
        self.held.extend(self.queued.drain(..taken));
        taken
    }

    fn complete_held(&mut self) {
        self.completed.extend(self.held.drain(..).map(|number| (number, result_of(number))));
    }
}

fn result_of(number: u64) -> i32 {
    1000 + number as i32
}

impl Ring for ScriptedRing {
    fn set_up(_places: u32, entries: u32) -> Result<Self, Error> {
        if let Some(errno) = SET_UP.get() {
            return Err(failed("io_uring_setup")(errno.into()));
        }
        OPEN.set(OPEN.get() + 1);
        let entries = entries as usize;
        Ok(Self { entries, queued: VecDeque::new(), held: VecDeque::new(), completed: Vec::new() })
    }

    fn check_operations(&self) -> Result<(), Error> {
        Ok(())
    }

    fn push(&mut self, _operation: &Entry, number: u64) -> bool {
        let fits = self.queued.len() < self.entries;
        assert!(fits, "more operations than the queue has entries");
        self.queued.push_back(number);
        fits
    }

    fn submit_and_wait(&mut self, _want: usize) -> io::Result<usize> {
        SUBMISSIONS.set(SUBMISSIONS.get() + 1);
        match SCRIPT.with_borrow_mut(VecDeque::pop_front) {
            Some(Step::Take(most)) => {
                let taken = self.take(most);
                self.complete_held();
                Ok(taken)
            }
            Some(Step::Hold) => Ok(self.take(usize::MAX)),
            Some(Step::Backwards) => {
                let taken = self.take(usize::MAX);
                self.held.make_contiguous().reverse();
                self.complete_held();
                Ok(taken)
            }
            Some(Step::Fail(errno)) => Err(errno.into()),
            None => {
                let taken = self.take(usize::MAX);
                self.complete_held();
                Ok(taken)
            }
        }
    }

    fn completions(&mut self, mut done: impl FnMut(u64, i32)) {
        self.completed.drain(..).for_each(|(number, result)| done(number, result));
    }

    fn update(&self, _offset: u32, files: &[RawFd]) -> io::Result<usize> {
        Ok(files.len().min(UPDATE_MAX.get()))
    }

    fn unregister(&mut self) {
        OPEN.set(OPEN.get() - 1);
    }
}

fn tables(count: usize) -> Tables<ScriptedRing> {
    Tables::of(count, PLACES, ENTRIES).unwrap()
}

/// The results of a receive from each of these places, in one batch.
fn receive_from(tables: &mut Tables<ScriptedRing>, places: &[u32]) -> Vec<i32> {
    let mut batch = ReceiveBatch::with_capacity(places.len(), 8);
    let token = Token::from_bits(1 << 32).unwrap();
    places.iter().for_each(|&place| batch.push(token, place));
    tables.receive_all(&mut batch);
    batch.operations().0.iter().map(|operation| operation.result).collect()
}

fn results(numbers: std::ops::Range<u64>) -> Vec<i32> {
    numbers.map(result_of).collect()
}

#[test]
fn a_short_submission_is_followed_by_another() {
    let mut tables = tables(1);
    for steps in [&[Step::Take(0)][..], &[Step::Take(1), Step::Take(0), Step::Take(2)]] {
        script(steps.iter().copied());
        assert_eq!(receive_from(&mut tables, &[3, 1, 2]), results(0..3));
        assert_eq!(SUBMISSIONS.get(), steps.len() + usize::from(steps.len() == 1));
    }
    assert_eq!(tables.take_lost(), None);
}

#[test]
fn a_temporary_error_is_retried() {
    let mut tables = tables(1);
    for errno in [Errno::EAGAIN, Errno::EBUSY, Errno::EINTR, Errno::ENOMEM] {
        script([Step::Fail(errno); 5]);
        assert!(matches!(tables.receive(2, &mut [0; 8]), IoResult::Bytes(1000)));
        script([Step::Take(1), Step::Fail(errno), Step::Take(1), Step::Fail(errno)]);
        assert_eq!(receive_from(&mut tables, &[0, 1, 2]), results(0..3));
    }
    assert_eq!(tables.take_lost(), None);
}

#[test]
fn a_ring_with_a_permanent_error_is_given_up_and_its_places_are_reported() {
    let steps: [Vec<Step>; 3] = [
        vec![Step::Fail(Errno::EBADF)],
        vec![Step::Fail(Errno::ENOMEM); SUBMIT_TRIES_MAX as usize + 1],
        // The ring accepts nothing, without an error.
        vec![Step::Take(0); SUBMIT_TRIES_MAX as usize + 2],
    ];
    for steps in steps {
        let mut tables = tables(2);
        let mut moving = vec![(PLACES, socket::spare().unwrap())];
        tables.register(&mut moving);
        assert_eq!((moving.len(), OPEN.get()), (0, 2), "a place in the second table");
        script(steps);
        // The second table is the first to be submitted.
        assert_eq!(receive_from(&mut tables, &[0, PLACES, 1]), [1000, LOST, 1002]);
        assert_eq!(OPEN.get(), 1);
        let places = PLACES as usize..2 * PLACES as usize;
        assert_eq!((tables.take_lost(), tables.take_lost()), (Some(places), None));
        let again = tables.receive(PLACES, &mut [0; 8]);
        assert!(matches!(&again, IoResult::Failed(error) if error.errno() == Some(libc::ENOMEM)));
        assert_eq!(receive_from(&mut tables, &[PLACES + 1, 1]), [LOST, 1001]);
    }
}

#[test]
fn operations_completed_before_a_ring_is_lost_keep_their_result() {
    let mut tables = tables(1);
    script([Step::Take(1), Step::Fail(Errno::EBADF)]);
    // The fifth operation would have been part of the next submission.
    assert_eq!(receive_from(&mut tables, &[5, 4, 3, 2, 1]), [1000, LOST, LOST, LOST, LOST]);
    assert_eq!(tables.take_lost(), Some(0..PLACES as usize));
}

#[test]
fn results_may_arrive_late_and_in_any_order() {
    let mut tables = tables(1);
    for steps in [&[Step::Backwards][..], &[Step::Hold, Step::Backwards], &[Step::Hold, Step::Hold]]
    {
        script(steps.iter().copied());
        assert_eq!(receive_from(&mut tables, &[7, 8, 9, 10]), results(0..4));
        script(steps.iter().copied());
        assert!(matches!(tables.send(1, b"alone"), IoResult::Bytes(1000)));
    }
    assert_eq!(tables.take_lost(), None);
}

#[test]
fn more_operations_than_entries_go_in_several_submissions() {
    let mut tables = tables(2);
    tables.register(&mut vec![(PLACES, socket::spare().unwrap())]);
    script([]);
    let places: Vec<_> = (0..2 * PLACES).map(|place| place * 7 % (2 * PLACES)).collect();
    assert_eq!(receive_from(&mut tables, &places), results(0..2 * u64::from(PLACES)));
    assert_eq!(SUBMISSIONS.get(), (2 * PLACES / ENTRIES) as usize);
    assert!(tables.busy.is_empty());
}

#[test]
fn a_file_that_a_table_refuses_keeps_its_descriptor() {
    let mut tables = tables(1);
    UPDATE_MAX.set(2);
    let mut moving: Vec<_> = [3, 1, 2, 9].map(|place| (place, socket::spare().unwrap())).into();
    tables.register(&mut moving);
    let left: Vec<_> = moving.iter().map(|&(place, _)| place).collect();
    assert_eq!(left, [3], "one of three consecutive places");
}

/// Collects the log lines of this thread.
struct Log;

impl log::Log for Log {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        LINES.with_borrow_mut(|lines| lines.push(record.args().to_string()));
    }

    fn flush(&self) {}
}

#[test]
fn without_a_ring_auto_falls_back_with_a_warning_and_registered_is_an_error() {
    log::set_logger(&Log).unwrap();
    log::set_max_level(log::LevelFilter::Warn);
    let choose = |wanted| choose_tables::<ScriptedRing>(wanted, 1 << 30, 0);
    for errno in [Errno::EPERM, Errno::ENOSYS] {
        SET_UP.set(Some(errno));
        assert!(choose(FileTable::Auto).unwrap().is_none());
        let lines = LINES.take();
        assert_eq!(lines.len(), 1, "{lines:?}");
        let why = io::Error::from(errno).to_string();
        let start = "connections stay in the process's descriptor table: io_uring_setup: ";
        assert!(lines[0].starts_with(start) && lines[0].contains(&why), "{lines:?}");
        let error = choose(FileTable::Registered).unwrap_err();
        assert_eq!(error.errno(), Some(errno as i32));
        assert!(choose(FileTable::Process).unwrap().is_none());
    }
    SET_UP.set(None);
    assert!(choose(FileTable::Auto).unwrap().is_some());
    assert!(choose(FileTable::Registered).unwrap().is_some());
    assert_eq!((LINES.take().len(), OPEN.get()), (0, 0));
}
