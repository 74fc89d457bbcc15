//! A reactor driven by tokio, on its thread: `cargo run --example in_tokio -- 127.0.0.1:7007`.
//!
//! The reactor holds the connections, and tokio does the work that is easier with tasks: here each line that arrives
//! becomes a query to a task, which sleeps and then sends the answer through a mailbox.

use std::sync::mpsc::TrySendError;
use std::time::Duration;

use reactor::{
    Config, Context, Handler, Incoming, ListenOptions, Mailbox, Reactor, Sender, Signal, Status,
    Token,
};
use tokio::io::unix::AsyncFd;
use tokio::runtime;
use tokio::task::LocalSet;
use tokio::time::{sleep, sleep_until};

use common::{Failure, address};

mod common;

const ANSWERS_MAX: usize = 1024;

/// The simulated duration of a database query.
const LOOKUP: Duration = Duration::from_millis(10);

struct Service {
    answers: Mailbox<(Token, Vec<u8>)>,
    answer: Sender<(Token, Vec<u8>)>,
}

impl Handler for Service {
    type Conn = ();

    fn on_accept(&mut self, _cx: &mut Context<()>, _incoming: &Incoming<'_>) -> Option<()> {
        Some(())
    }

    fn on_data(&mut self, cx: &mut Context<()>, token: Token, _conn: &mut (), bytes: &mut [u8]) {
        // One query at a time: its answer resumes the reads.
        cx.pause_reads(token);
        let (answer, question) = (self.answer.clone(), bytes.to_ascii_uppercase());
        tokio::task::spawn_local(async move {
            sleep(LOOKUP).await;
            let mut message = (token, question);
            while let Err(TrySendError::Full(back)) = answer.send(message) {
                message = back;
                sleep(LOOKUP).await;
            }
        });
    }

    fn on_wake(&mut self, cx: &mut Context<()>) {
        while let Some((token, bytes)) = self.answers.receive() {
            match cx.write_chunk(token, bytes) {
                Ok(_) => cx.resume_reads(token),
                Err(_) => cx.abort(token),
            }
        }
    }
}

/// Runs the reactor like [`Reactor::run`], together with tokio's other tasks.
async fn run<H: Handler>(reactor: Reactor<H::Conn>, handler: &mut H) -> Result<(), Failure> {
    #[expect(deprecated, reason = "its successor is unsafe, for types whose descriptor may change")]
    let mut reactor = AsyncFd::new(reactor)?;
    loop {
        let due = reactor.get_ref().next_deadline();
        let timer = async {
            match due {
                Some(due) => sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = timer => {
                if turn(reactor.get_mut(), handler)?.0 == Status::Stopped {
                    return Ok(());
                }
            }
            readable = reactor.readable_mut() => {
                let mut readable = readable?;
                let (status, events) = turn(readable.get_inner_mut(), handler)?;
                // tokio is edge-triggered, so the descriptor counts as readable until a turn has found no event.
                if events == 0 {
                    readable.clear_ready();
                }
                if status == Status::Stopped {
                    return Ok(());
                }
            }
        }
    }
}

/// Makes a turn without waiting; returns the number of events that it found.
fn turn<H: Handler>(
    reactor: &mut Reactor<H::Conn>,
    handler: &mut H,
) -> Result<(Status, u64), Failure> {
    let before = reactor.context().stats().events;
    let status = reactor.turn(handler, Some(Duration::ZERO))?;
    Ok((status, reactor.context().stats().events - before))
}

fn main() -> Result<(), Failure> {
    let address = address(&std::env::args().nth(1).unwrap_or("127.0.0.1:7007".to_owned()));
    let mut reactor = Reactor::new(&Config::default())?;
    let cx = reactor.context();
    cx.watch_signals(&[Signal::Interrupt, Signal::Terminate])?;
    let listener = cx.listen(address, &ListenOptions::default())?;
    println!("listening on {}", cx.listener_addr(listener)?);
    let (answer, answers) = cx.mailbox(ANSWERS_MAX);
    let mut service = Service { answers, answer };
    let tokio = runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&tokio, run(reactor, &mut service))
}
