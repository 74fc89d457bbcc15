//! Injects errors into system calls: the server is traced, and a chosen call only returns an error.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::faults::Skipped;

const EVENT_TIMEOUT: Duration = Duration::from_secs(10);

/// A call that can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Accept4,
    /// With EPOLL_CTL_ADD.
    EpollCtlAdd,
}

/// Traces the system calls of a process's main thread, until it is dropped.
#[derive(Debug)]
pub(crate) struct Tracer {
    shared: Arc<Shared>,
    events: Receiver<Result<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    failing: Mutex<Option<(Call, Errno)>>,
    waits: AtomicU64,
    is_over: AtomicBool,
}

impl Tracer {
    /// # Errors
    /// [`Skipped`] if processes can't be traced.
    pub(crate) fn start(pid: Pid) -> Result<Self> {
        let shared = Arc::<Shared>::default();
        let (sender, events) = channel();
        let shared_with_thread = Arc::clone(&shared);
        // The kernel accepts requests only from the thread that attached.
        thread::spawn(move || {
            let attached = attach(pid)
                .map_err(|why| Skipped(format!("no process can be traced here: {why:#}")).into());
            let is_attached = attached.is_ok();
            let _ = sender.send(attached);
            if is_attached {
                let _ = sender.send(follow(pid, &shared_with_thread));
            }
        });
        let tracer = Self { shared, events };
        tracer.next_event()?;
        Ok(tracer)
    }

    /// Makes this call, and no other, fail with this error.
    pub(crate) fn fail(&self, call: Call, errno: Errno) -> Result<()> {
        self.set(Some((call, errno)))
    }

    /// Lets all calls succeed again.
    pub(crate) fn fail_none(&self) -> Result<()> {
        self.set(None)
    }

    fn set(&self, failing: Option<(Call, Errno)>) -> Result<()> {
        *self.shared.failing.lock().map_err(|_| anyhow!("the tracer panicked"))? = failing;
        Ok(())
    }

    /// How often the process has waited for events so far. Context switches are no measure, because tracing causes
    /// some at each call.
    pub(crate) fn waits(&self) -> u64 {
        self.shared.waits.load(Ordering::Relaxed)
    }

    /// Detaches.
    pub(crate) fn end(self) -> Result<()> {
        self.shared.is_over.store(true, Ordering::Relaxed);
        self.next_event()
    }

    fn next_event(&self) -> Result<()> {
        match self.events.recv_timeout(EVENT_TIMEOUT) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) => bail!("the traced process makes no call"),
            Err(RecvTimeoutError::Disconnected) => bail!("the tracer panicked"),
        }
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
    }
}

fn attach(pid: Pid) -> Result<()> {
    ptrace::seize(pid, Options::PTRACE_O_TRACESYSGOOD)?;
    ptrace::interrupt(pid)?;
    waitpid(pid, Some(WaitPidFlag::__WALL))?;
    ptrace::syscall(pid, None)?;
    Ok(())
}

/// Handles the stops: the process stops when it makes a call and when the call returns.
fn follow(pid: Pid, shared: &Shared) -> Result<()> {
    let mut is_made = false;
    let mut failing = None;
    loop {
        let mut signal = None;
        match waitpid(pid, Some(WaitPidFlag::__WALL))? {
            WaitStatus::PtraceSyscall(_) => {
                is_made = !is_made;
                if is_made {
                    failing = on_call(pid, shared)?;
                } else if let Some((errno, argument)) = failing.take() {
                    let mut registers = ptrace::getregs(pid)?;
                    registers::set_result(&mut registers, errno, argument);
                    ptrace::setregs(pid, registers)?;
                }
            }
            WaitStatus::Stopped(_, received) => signal = Some(received),
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {
                bail!("the traced process has ended")
            }
            _ => {}
        }
        // Not during a call whose registers have to be restored.
        if !is_made && shared.is_over.load(Ordering::Relaxed) {
            return Ok(ptrace::detach(pid, signal)?);
        }
        ptrace::syscall(pid, signal)?;
    }
}

/// Handles the start of a call. Returns the error if the call is to fail, and its replaced argument.
fn on_call(pid: Pid, shared: &Shared) -> Result<Option<(Errno, u64)>> {
    let mut registers = ptrace::getregs(pid)?;
    let number = registers::number(&registers);
    if registers::WAITS.contains(&number) {
        shared.waits.fetch_add(1, Ordering::Relaxed);
    }
    let failing = *shared.failing.lock().map_err(|_| anyhow!("the tracer panicked"))?;
    let Some((call, errno)) = failing else { return Ok(None) };
    let is_meant = match call {
        Call::Accept4 => number == libc::SYS_accept4,
        Call::EpollCtlAdd => {
            let operation = i64::from(libc::EPOLL_CTL_ADD).cast_unsigned();
            number == libc::SYS_epoll_ctl && registers::argument_2(&registers) == operation
        }
    };
    if !is_meant {
        return Ok(None);
    }
    // With an invalid descriptor the call has no effect.
    let argument = registers::set_argument_1(&mut registers, u64::MAX);
    ptrace::setregs(pid, registers).context("the call can't be changed")?;
    Ok(Some((errno, argument)))
}

#[cfg(target_arch = "x86_64")]
mod registers {
    use nix::errno::Errno;
    use nix::libc::{self, c_long, user_regs_struct};

    pub(super) const WAITS: &[c_long] = &[libc::SYS_epoll_wait, libc::SYS_epoll_pwait];

    pub(super) fn number(registers: &user_regs_struct) -> c_long {
        registers.orig_rax.cast_signed()
    }

    pub(super) fn argument_2(registers: &user_regs_struct) -> u64 {
        registers.rsi
    }

    /// Returns the old value.
    pub(super) fn set_argument_1(registers: &mut user_regs_struct, value: u64) -> u64 {
        std::mem::replace(&mut registers.rdi, value)
    }

    pub(super) fn set_result(registers: &mut user_regs_struct, errno: Errno, argument_1: u64) {
        registers.rax = (-i64::from(errno as i32)).cast_unsigned();
        registers.rdi = argument_1;
    }
}

#[cfg(target_arch = "aarch64")]
mod registers {
    use nix::errno::Errno;
    use nix::libc::{self, c_long, user_regs_struct};

    pub(super) const WAITS: &[c_long] = &[libc::SYS_epoll_pwait];

    pub(super) fn number(registers: &user_regs_struct) -> c_long {
        registers.regs[8].cast_signed()
    }

    pub(super) fn argument_2(registers: &user_regs_struct) -> u64 {
        registers.regs[1]
    }

    /// Returns the old value.
    pub(super) fn set_argument_1(registers: &mut user_regs_struct, value: u64) -> u64 {
        std::mem::replace(&mut registers.regs[0], value)
    }

    /// The result is in the register of the first argument.
    pub(super) fn set_result(registers: &mut user_regs_struct, errno: Errno, _argument_1: u64) {
        registers.regs[0] = (-i64::from(errno as i32)).cast_unsigned();
    }
}
