//! One thread's part of the admission.

use std::sync::Arc;
use std::time::Duration;

use reactor::{Context, Error, Incoming, ListenerId, TimerId, Token};

use super::Admission;
use super::decision::{Decision, Shortage};
use super::memory::Overload;
use super::per_source::{PerSourceLimit, Source};
use crate::args::Settings;
use crate::counts::Counts;
use crate::sync::Snapshot;

/// After the allowed refusals, the other peers wait in the backlogs for this time, and for the next sample.
const REFUSAL_PAUSE: Duration = Duration::from_millis(10);

/// The backlog of each port while memory is short, because its connections take memory too. Refused peers wait in it
/// for at most one wake-up.
const BACKLOG_REFUSING: u32 = 16;
const BACKLOG_PAUSED: u32 = 1;

/// Admits or refuses each peer that connects to this thread's listeners.
#[derive(Debug)]
pub(crate) struct Gate {
    admission: Arc<Admission>,
    decision: Snapshot<Decision>,
    overload: Overload,
    backlog: Option<u32>,
    /// Unused admissions of the current decision.
    admissions: u64,
    /// Whether the listeners are set to admit peers; `false` while memory is short.
    accepting: bool,
    /// A place of the capacity is reserved for a connection that is not open yet.
    has_place: bool,
    per_source: Option<PerSourceLimit>,
    /// While it runs, nothing is accepted.
    pause_timer: Option<TimerId>,
    refused_by: Counts,
}

impl Gate {
    pub(crate) fn new(admission: &Arc<Admission>, settings: &Settings) -> Self {
        Self {
            admission: Arc::clone(admission),
            decision: admission.decision.snapshot(),
            overload: settings.overload,
            backlog: settings.backlog,
            admissions: 0,
            accepting: true,
            has_place: false,
            per_source: admission.per_source.as_ref().map(PerSourceLimit::share),
            pause_timer: None,
            refused_by: Counts::new(),
        }
    }

    /// Whether this peer is admitted. Its share of the limits is reserved until the connection opens or fails to.
    pub(crate) fn admit(&mut self, cx: &mut Context<()>, incoming: &Incoming<'_>) -> bool {
        let Some(reason) = self.refusal(cx, incoming) else { return true };
        self.release();
        *self.refused_by.entry(reason).or_default() += 1;
        self.note_refusal(cx);
        false
    }

    fn refusal(&mut self, cx: &mut Context<()>, incoming: &Incoming<'_>) -> Option<&'static str> {
        self.has_place = self.admission.capacity.claim();
        if !self.has_place {
            self.admission.capacity.log_full(cx.now());
            return Some("max_connections");
        }
        // With `Pause`, this peer was accepted before the listeners were paused.
        if let Err(shortage) = self.use_admission(cx)
            && self.overload == Overload::Refuse
        {
            return Some(shortage);
        }
        let per_source = self.per_source.as_mut()?;
        let Ok(address) = incoming.peer_addr() else { return Some("gone") };
        let source = Source::from(address.ip());
        if per_source.claim(source) {
            return None;
        }
        self.admission.log_source(source);
        Some("max_per_source")
    }

    fn use_admission(&mut self, cx: &mut Context<()>) -> Result<(), &'static str> {
        self.refresh();
        if self.admissions == 0 {
            match self.draw(cx) {
                Ok(drawn) => self.admissions = drawn,
                Err(shortage) => {
                    self.set_accepting(cx, false);
                    return Err(shortage);
                }
            }
        }
        self.admissions -= 1;
        Ok(())
    }

    /// Takes admissions of the decision, or of the next one if none is left; returns at least one.
    fn draw(&mut self, cx: &Context<()>) -> Result<u64, &'static str> {
        let drawn = self.decision.value.draw().map_err(Shortage::name)?;
        if drawn > 0 {
            return Ok(drawn);
        }
        self.admission.sample_after(&self.decision, cx.now());
        self.refresh();
        let drawn = self.decision.value.draw().map_err(Shortage::name)?;
        Ok(drawn.max(1))
    }

    /// Reads the latest decision. Admissions of an older decision are void.
    fn refresh(&mut self) {
        if self.admission.decision.refresh(&mut self.decision) {
            self.admissions = 0;
        }
    }

    /// Samples memory for all threads.
    pub(crate) fn sample(&self, cx: &Context<()>) {
        self.admission.sample(cx.now());
    }

    /// Reads the latest decision, and applies it to the listeners.
    pub(crate) fn follow(&mut self, cx: &mut Context<()>) {
        self.refresh();
        self.set_accepting(cx, self.decision.value.shortage.is_none());
    }

    /// The decision that was read last.
    pub(crate) fn decision(&self) -> &Decision {
        &self.decision.value
    }

    /// Starts or stops accepting, if that is a change; while memory is short, the backlogs are short too.
    fn set_accepting(&mut self, cx: &mut Context<()>, accepting: bool) {
        if std::mem::replace(&mut self.accepting, accepting) == accepting {
            return;
        }
        let (overload, backlog) = (self.overload, self.backlog);
        for_each_listener(cx, |cx, listener| match (accepting, overload) {
            (true, Overload::Refuse) => cx.set_backlog(listener, backlog),
            (true, Overload::Pause) => {
                cx.set_backlog(listener, backlog).and_then(|()| cx.resume_accepts(listener))
            }
            (false, Overload::Refuse) => cx.set_backlog(listener, Some(BACKLOG_REFUSING)),
            (false, Overload::Pause) => cx
                .pause_accepts(listener)
                .and_then(|()| cx.set_backlog(listener, Some(BACKLOG_PAUSED))),
        });
    }

    /// Refusing takes memory for a moment too: after the allowed refusals, the others wait for the next sample.
    fn note_refusal(&mut self, cx: &mut Context<()>) {
        if self.accepting || self.overload == Overload::Pause || self.pause_timer.is_some() {
            return;
        }
        if !self.decision.value.refuse()
            && let Ok(timer) = cx.add_timer(REFUSAL_PAUSE)
        {
            self.pause_timer = Some(timer);
            for_each_listener(cx, Context::pause_accepts);
        }
    }

    /// Returns whether this is the timer that ends the pause after refusals; if so, takes a sample and accepts again.
    pub(crate) fn end_pause(&mut self, cx: &mut Context<()>, timer: TimerId) -> bool {
        if self.pause_timer != Some(timer) {
            return false;
        }
        self.pause_timer = None;
        self.refresh();
        if self.decision.value.has_refused_enough() {
            self.admission.sample_after(&self.decision, cx.now());
        }
        for_each_listener(cx, Context::resume_accepts);
        true
    }

    pub(crate) fn note_open(&mut self, token: Token) {
        self.has_place = false;
        self.admission.capacity.note_open();
        if let Some(per_source) = &mut self.per_source {
            per_source.note_open(token);
        }
    }

    /// Releases the place of an open connection.
    pub(crate) fn note_close(&mut self, token: Token) {
        self.admission.capacity.note_close();
        if let Some(per_source) = &mut self.per_source {
            per_source.note_close(token);
        }
    }

    /// Releases what was reserved for a connection that did not open.
    pub(crate) fn release(&mut self) {
        if std::mem::take(&mut self.has_place) {
            self.admission.capacity.release();
        }
        if let Some(per_source) = &mut self.per_source {
            per_source.release_unopened();
        }
    }

    /// The connections of all threads.
    pub(crate) fn open(&self) -> u64 {
        self.admission.capacity.open()
    }

    /// Logs that there is room again, if a line said that there was none.
    pub(crate) fn log_room(&self, cx: &Context<()>) {
        if !cx.is_shutting_down() {
            self.admission.capacity.log_room(cx.now());
        }
    }

    pub(crate) fn refused_by(&self) -> &Counts {
        &self.refused_by
    }
}

fn for_each_listener(
    cx: &mut Context<()>,
    mut set: impl FnMut(&mut Context<()>, ListenerId) -> Result<(), Error>,
) {
    let listeners: Vec<ListenerId> = cx.listeners().collect();
    for listener in listeners {
        if let Err(error) = set(cx, listener) {
            log::warn!("a listener's accepting or backlog can't be changed: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Instant;

    use clap::Parser;
    use reactor::{Config, Reactor};

    use super::*;
    use crate::admission::MemoryGuard;
    use crate::args::{Args, Command};

    fn admission() -> (Box<Settings>, Arc<Admission>) {
        let Ok(Command::Serve(settings)) = Args::parse_from(["c1000k-server"]).check() else {
            panic!("no argument is needed")
        };
        let guard = MemoryGuard::new(settings.memory_reserve, 1);
        let admission = Arc::new(Admission::new(&settings, 10, guard));
        (settings, admission)
    }

    #[test]
    fn admissions_of_an_older_decision_are_void() {
        let (settings, admission) = admission();
        let config = Config { file_table: reactor::FileTable::Process, ..Config::default() };
        let mut reactor = Reactor::new(&config).unwrap();
        let cx = reactor.context();
        let mut gate = Gate::new(&admission, &settings);
        assert_eq!(gate.use_admission(cx), Ok(()), "the first one waits for a sample");
        assert!(gate.admissions > 0 && gate.accepting);
        admission.close_for_buffers();
        assert_eq!(gate.use_admission(cx), Err("tcp_mem"));
        assert!(gate.admissions == 0 && !gate.accepting);
        admission.sample(Instant::now());
        assert_eq!(gate.use_admission(cx), Ok(()));
        gate.follow(cx);
        assert!(gate.accepting);
    }

    #[test]
    fn of_threads_that_need_a_new_decision_one_samples() {
        let (_, admission) = admission();
        let seen = admission.decision.snapshot();
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| admission.sample_after(&seen, Instant::now()));
            }
        });
        let record = admission.memory_guard_record(Instant::now());
        assert_eq!(record.map(|guard| guard.looks), Some(1));
    }
}
