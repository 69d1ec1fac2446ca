#!/bin/sh
# Runs a compiler, and keeps what it says beside its object, in <object>.txt.
object=
for argument; do
  if [ "$object" = next ]; then object=$argument; fi
  if [ "$argument" = -o ]; then object=next; fi
done
"$@" 2> "$object.txt"
status=$?
grep -v -e '^ptxas info' -e 'bytes stack frame' "$object.txt" >&2
exit $status
