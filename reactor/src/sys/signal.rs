//! Signals, read from a signalfd.

use std::os::fd::AsFd;

use nix::sys::epoll::EpollFlags;
use nix::sys::signal::{SigSet, Signal as NixSignal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::poller::Poller;
use super::refused;
use crate::error::Error;
use crate::signal::Signal;

/// A signalfd.
#[derive(Debug)]
pub(crate) struct SignalReader(SignalFd);

impl SignalReader {
    /// Blocks the signals in this thread, so that they are delivered only to the signalfd, which this poller reports.
    pub(crate) fn watched(signals: &[Signal], poller: &Poller, data: u64) -> Result<Self, Error> {
        let mask: SigSet = signals.iter().map(|&signal| to_nix(signal)).collect();
        mask.thread_block().map_err(refused("pthread_sigmask"))?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let reader = SignalFd::with_flags(&mask, flags).map_err(refused("signalfd"))?;
        poller.watch(reader.as_fd(), EpollFlags::EPOLLIN, data)?;
        Ok(Self(reader))
    }

    pub(crate) fn read(&self) -> Option<Signal> {
        let info = self.0.read_signal().ok()??;
        ALL_SIGNALS.into_iter().find(|&signal| to_nix(signal) as u32 == info.ssi_signo)
    }
}

const ALL_SIGNALS: [Signal; 8] = [
    Signal::Hangup,
    Signal::Interrupt,
    Signal::Quit,
    Signal::Terminate,
    Signal::Child,
    Signal::WindowChange,
    Signal::User1,
    Signal::User2,
];

fn to_nix(signal: Signal) -> NixSignal {
    match signal {
        Signal::Hangup => NixSignal::SIGHUP,
        Signal::Interrupt => NixSignal::SIGINT,
        Signal::Quit => NixSignal::SIGQUIT,
        Signal::Terminate => NixSignal::SIGTERM,
        Signal::Child => NixSignal::SIGCHLD,
        Signal::WindowChange => NixSignal::SIGWINCH,
        Signal::User1 => NixSignal::SIGUSR1,
        Signal::User2 => NixSignal::SIGUSR2,
    }
}
