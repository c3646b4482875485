//! One client: a thread that reads and executes its commands one by one, and one that writes.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;

use serde_json::Value;

use super::backend::Backend;
use super::commands::{self, Order, Session, Task};
use super::errors::QmpError;
use super::events::{Audience, Peer};
use super::outbox::Outbox;
use super::wire::{self, Decoder, Incoming};
use crate::sync::Arc;

/// Serves a client until it goes, reads no events, or is cut off. Returns when all its answers were sent.
///
/// # Errors
/// No thread or descriptor could be had for it.
pub(super) fn serve(
    stream: UnixStream,
    peer: &Arc<Peer>,
    backend: &dyn Backend,
    audience: &Audience,
) -> io::Result<()> {
    let output = stream.try_clone()?;
    thread::scope(|scope| {
        let writer = thread::Builder::new().name("control-writer".to_owned());
        writer.spawn_scoped(scope, || write(output, peer))?;
        peer.outbox.reply(wire::encode(&commands::greeting()));
        read(stream, peer, backend, audience);
        audience.leave(peer);
        peer.outbox.end();
        Ok(())
    })
}

fn write(mut output: UnixStream, peer: &Peer) {
    while let Some(line) = peer.outbox.next() {
        if output.write_all(&line).is_err() {
            break;
        }
    }
    // All was sent, or nobody wants it: the reader must not wait for more commands.
    peer.cut();
}

fn read(mut input: UnixStream, peer: &Arc<Peer>, backend: &dyn Backend, audience: &Audience) {
    let mut decoder = Decoder::default();
    let mut session = Session::default();
    let mut buffer = [0; 4096];
    loop {
        let count = match input.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        decoder.push(&buffer[..count], |incoming| match incoming {
            Incoming::Message(message) => execute(message, &mut session, peer, backend, audience),
            Incoming::Rubbish(why) => answer(&peer.outbox, Err(QmpError::usage(why)), None),
        });
    }
}

fn execute(message: Value, session: &mut Session, peer: &Arc<Peer>, backend: &dyn Backend, audience: &Audience) {
    let outbox = &peer.outbox;
    let id = message.as_object().and_then(|members| members.get("id")).cloned();
    match session.understand(message) {
        Err(error) => answer(outbox, Err(error), id),
        Ok(Task::Negotiated) => {
            answer(outbox, Ok(Value::Object(Default::default())), id);
            audience.join(peer);
        }
        Ok(Task::Quit) => {
            answer(outbox, Ok(Value::Object(Default::default())), id);
            backend.quit();
        }
        Ok(Task::Run(command, arguments)) if command.order == Order::ReturnFirst => {
            outbox.hold();
            let result = command.run(backend, arguments);
            outbox.release(wire::encode(&commands::reply(result, id)));
        }
        Ok(Task::Run(command, arguments)) => answer(outbox, command.run(backend, arguments), id),
    }
}

fn answer(outbox: &Outbox, answer: commands::Answer, id: Option<Value>) {
    outbox.reply(wire::encode(&commands::reply(answer, id)));
}
