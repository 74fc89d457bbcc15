//! Proofs: the echo when a connection opens, and the second one after the hold.

use std::ops::Range;

use reactor::{Context, Token};

use super::{Conn, ConnStage, Fault, Flood, Stage};
use crate::greeting::{Echo, Greeting};

/// Slots looked at before other events get their turn.
const SLOTS_PER_SLICE: usize = 4096;

impl Flood<'_> {
    pub(super) fn note_echo(
        &mut self,
        cx: &mut Context<Conn>,
        token: Token,
        conn: &mut Conn,
        bytes: &[u8],
    ) {
        if conn.stage == ConnStage::Held {
            // Nothing was asked, so nothing may come.
            return self.give_up(cx, token, conn, Fault::Garbled);
        }
        match Greeting::of(conn.number).check(conn.matched, bytes) {
            Echo::Partial(matched) => conn.matched = matched,
            Echo::Whole => self.note_proof(cx, token, conn),
            Echo::Wrong => self.give_up(cx, token, conn, Fault::Garbled),
        }
    }

    fn note_proof(&mut self, cx: &mut Context<Conn>, token: Token, conn: &mut Conn) {
        cx.clear_timeout(token);
        conn.matched = 0;
        if let Some(pass) = self.tally.verified_passes.last_mut() {
            *pass += 1;
        }
        if conn.stage == ConnStage::FirstProof {
            return self.keep(cx, conn);
        }
        conn.stage = ConnStage::Held;
        self.in_flight -= 1;
        self.stall.note_success();
        self.go_on(cx);
    }

    /// Asks as many connections as may be under way, from where it left off.
    pub(super) fn prove_more(&mut self, cx: &mut Context<Conn>) {
        while self.in_flight < self.settings.in_flight_max && self.cursor < cx.slots() {
            let slice = self.cursor..self.slice_end(cx);
            self.prove_slice(cx, slice);
        }
        if self.in_flight == 0 && self.cursor >= cx.slots() && self.stage == Stage::Proof {
            self.begin_teardown(cx);
        }
    }

    /// As many slots as there may be proofs under way.
    fn slice_end(&self, cx: &Context<Conn>) -> usize {
        let room = self.settings.in_flight_max - self.in_flight;
        (self.cursor + room.min(SLOTS_PER_SLICE)).min(cx.slots())
    }

    fn prove_slice(&mut self, cx: &mut Context<Conn>, slice: Range<usize>) {
        self.cursor = slice.end;
        let tokens: Vec<Token> = cx.tokens(slice).collect();
        for token in tokens {
            let Some(conn) = cx.conn_mut(token) else { continue };
            conn.stage = ConnStage::SecondProof;
            let greeting = Greeting::of(conn.number);
            self.in_flight += 1;
            // Where it does not take the bytes, `on_close` follows and counts the loss.
            let _ = cx.write(token, greeting.as_bytes());
            cx.set_timeout(token, self.settings.timeout);
        }
    }
}
