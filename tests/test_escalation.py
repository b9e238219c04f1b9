"""What an agent says in prose: who must act next? Each rule has two tables, and what
tempts a rule without being its business stands in the second one."""
from __future__ import annotations

import pytest

import ktrdr_orchestrator as ko

ESCALATES = {
    "text_question": (
        "Continue with the migration? [Y/N]",
        "Which of the two queues should the worker read?",
        "Do you want me to start with the importer?",
        "I need the API token for the staging server to go on. Where can I find it?",
        "I've read the project's instructions. What would you like me to work on?",
        ("It looks like the prompt was cut off after \"and then\". Can you send the "
         "rest of it?"),
        ("Before I start I have three questions:\n\n1. Should anonymous visitors see "
         "the prices?\n2. Which currencies are supported?\n3. Is the old export still "
         "used?\n\nOnce I have your answers I'll write the plan."),
        ("Review complete. Three findings of medium severity.\n\n**What should I do "
         "with these issues?**\n\n1. **Fix them automatically**\n2. **Create action "
         "items**\n3. **Show me details**\n\nChoose [1], [2], or specify which issue "
         "to examine:"),
        "Would you like me to go with the first approach or the second?",
        "How should I handle the 23 users who have no email address?",
        ("I found nothing named `OrderSync`. Did you mean `OrderSyncJob` or "
         "`SyncOrders`?"),
        ("I'll need to see the current `Dockerfile` before I can suggest changes. Can "
         "you share it?"),
        "Ich habe den Plan fertig. Soll ich mit der Umsetzung beginnen?",
        "No puedo continuar sin la clave de la API. ¿Puedes proporcionarla?",
        "Нужен доступ к базе. Какой пароль использовать?",
        "I don't have write access to this folder. How would you like to proceed?",
        "I see the instructions but no concrete request. How can I help?",
        "Understood, I've read the rules. What's the first task?",
        "Your message was empty apart from the reminder. What did you want to ask?",
        ("The names clash. Either rename the new class to `JobQueue` or move the old "
         "one out of the way. Which do you prefer?\n\nMy recommendation: rename the "
         "new one."),
        ("I've finished the analysis and have a plan. Ready to implement? Say yes and "
         "I start with the schema."),
        "Here's the outline of the article. Any changes, or shall I write it?",
        "It would help to see the full error. Could you paste the stack trace?",
        "I can't reproduce the problem from the description. What steps lead to it?",
        ("I've implemented everything except the e-mail provider, since neither the "
         "spec nor the code says which one to use. Which provider should it be?"),
        "Soll ich die alte Spalte löschen oder behalten?",
        "需要您的批准才能运行该命令。是否继续？",
        "I'd rather ask than guess: is the discount applied before or after tax?",
        ("There are two candidates for the entry point. Which should I change?\n\n1. "
         "`main.py`\n2. `cli.py`"),
        ("Could you add `models.py` and `views.py` to the chat so that I can make "
         "these edits?"),
        "The story isn't approved yet (status: draft). Should I implement it anyway?",
        ("It's not clear whether the export should include archived projects. What's "
         "the expected behaviour?"),
        "What can I help you with?",
        "Should the API return 404 or 403 for a project of somebody else?",
    ),
    "text_request": (
        "Three findings.\n\n[A] Fix all [B] Fix the first [C] Stop",
        "Please provide the schema of the orders table.",
        "<think>easy</think>\nReply with the goal and I will start.",
        ("The changes are staged. I tried to run `git commit` but it was not "
         "permitted in this session.\n\nTo continue, approve the commit command or "
         "run it yourself:\n\n```bash\ngit commit -m \"Add retry\"\n```"),
        ("It seems the file write needs to be approved by you. Please allow it when "
         "prompted."),
        ("I don't have permission to create files in this directory. Please grant "
         "write access to `/srv/app` and rerun."),
        ("I don't see a task description under `## TASK`. Please tell me what you "
         "want implemented."),
        "Nothing has been asked yet. Send me the feature spec and I'll begin.",
        "I'm ready. Give me a bug, a feature or a file to look at.",
        ("Found 4 problems.\n\n[1] Fix all automatically\n[2] Create issues\n[3] Show "
         "details\n\nYour choice:"),
        "Step 3 of 9 is drafted.\n\n[C] Continue to the next step\n[R] Revise",
        ("I paused before the force-push, since it rewrites a branch that two others "
         "use. Say the word and I'll do it."),
        ("<thinking>The user wants X. Should I ask?</thinking>\nPlease share the "
         "traceback, I can't tell the cause from the description alone."),
        ("I'm in plan mode, so nothing was edited. Approve the plan and I'll "
         "implement it."),
        ("I've added the logging. Please reproduce the crash once more and paste the "
         "new lines here; that tells us which branch it takes."),
        ("Since bash commands need approval here, please run these by hand and tell "
         "me the result:\n\n```\npnpm install\npnpm build\n```"),
        "I'm set up and have read `AGENTS.md`. Tell me what to work on.",
        ("**Story 3.2 is ready for review.**\n\nWhat next?\n\n[1] Start the review\n"
         "[2] Show the diff\n[3] Quit"),
        ("Draft of section 4 is above.\n\n**Select an option:** [A] Refine [B] "
         "Discuss [C] Continue"),
        ("I found 3 candidates and didn't want to guess. Let me know which you "
         "meant:\n- `parse_date`\n- `parse_datetime`\n- `parse_when`"),
        ("The plan is written to `PLAN.md`. Have a look and tell me if I should go "
         "ahead."),
        "The next step is destructive (it truncates `events`). Type `yes` to go ahead.",
        ("I've hit the limit of what can be done without hardware. Somebody has to "
         "plug in the device and tell me what the log shows."),
        "All set up. Choose a workflow to begin:\n\n[1] Plan\n[2] Build\n[3] Review",
        ("The tool call to write `Dockerfile` was denied again. Approve it to let me "
         "go on."),
        "[A] Accept the draft   [E] Edit   [Q] Quit",
    ),
    "text_blocked": (
        "I need you to create the OAuth client in the console.",
        "I’m still **blocked**: the sandbox refuses the write.",
        "Everything is written. The push requires your approval.",
        "I cannot continue without the key of the payment provider.",
        ("Still blocked: the Edit tool asks for approval each time and nobody is "
         "answering. This is the third loop with the same result."),
        ("The directory creation requires your approval. I'll wait for it before I "
         "write the modules."),
        ("I'm unable to go further: the sandbox denies network access and the "
         "packages are not cached. You'll have to either enable the network or vendor "
         "the dependencies."),
        ("All files are written. The only thing left is the commit, which needs your "
         "approval."),
        ("I need permission to run `docker compose up`. Without it the integration "
         "tests can't be executed and the task can't be finished."),
        ("Implementation is ready but I could not save it. **Action required:** grant "
         "write permission for `lib/parser.ts`."),
        ("Once you've added `OPENAI_API_KEY` to the environment, tell me and I'll "
         "continue with step 3."),
        ("**Decision needed:** the spec says 30 days in section 2 and 90 days in "
         "section 5."),
        ("The spec contradicts itself: section 2 says that deleted users keep their "
         "posts, section 5 says they lose them. I need a decision before I write the "
         "migration."),
        ("I can do this in two ways, and it's your call:\n- keep the endpoint and "
         "mark it deprecated\n- remove it now"),
        ("I'd need these files added to the chat first:\n\n- app/models/user.rb\n- "
         "app/controllers/users_controller.rb"),
        ("The following files will need changes:\n\n1. `api/routes.py`\n2. "
         "`api/schema.py`\n\nAdd them to the chat and I'll make the edits."),
        ("To finish this, please create these folders by hand, as I'm not able to:\n\n"
         "```\nmkdir -p app/api app/lib\n```\n\nAfter that I'll add the files."),
        ("Manual step required: someone with admin rights must enable the Pages "
         "feature in the repository settings. I can't do it with this token."),
        ("Loop 6: same as before. The write to `app/models.py` is pending your "
         "approval. Nothing else can be done until then."),
        "I need your approval to run `npx prisma migrate dev`.",
        ("## Status: blocked\n\nThe task asks for a push to `main`, which is "
         "protected. I need somebody with admin rights to allow it or to merge the "
         "pull request."),
        ("Before removing the table I'd like your confirmation, since there's no "
         "backup."),
        ("Blocked on the payment sandbox: the test account has been closed and only "
         "the owner can reopen it."),
        ("HALT: the working tree holds somebody else's changes. I need to know "
         "whether to stash or to keep them."),
        ("Everything is staged and the tests pass. I need your permission to commit: "
         "`git commit` was denied."),
        "Waiting for your decision on the schema before I go on.",
        "Awaiting your answer to the question above.",
        "Commit is pending your approval.",
        ("The test account's password has changed. I need the new one to run the "
         "end-to-end tests."),
        "To proceed, I need access to the private package registry.",
    ),
    "text_stuck": (
        "A human must sign the release before it goes out.",
        ("Task 4 is blocked. `gh auth status` says that nobody is logged in; someone "
         "has to run `gh auth login` on this machine before the release can be "
         "published."),
        ("The last open item needs a private key with funds on the test network, "
         "which I don't have. Everything else waits for it."),
        ("Python is not executable in this session. User must run `python3 "
         "scripts/build_index.py` and then restart the loop."),
        ("The database isn't running and I'm not allowed to start services. Please "
         "start PostgreSQL on port 5432, then I'll run the migration and finish."),
        ("The sandbox refused every attempt to write outside `.loop/`. I can list "
         "the exact edits, but a person must apply them or widen the permissions."),
        ("Please manually create the directories `src/hooks` and `src/store`, I lack "
         "the permission to do it."),
        "Please add `src/api/client.ts` to the chat. Then I can make the change.",
        ("I don't see `utils.py` in the files you've shared. Please add it so that I "
         "can edit it."),
        ("The task requires a decision that isn't mine: delete the user data for "
         "good, or keep it anonymised."),
        "No `fix_plan.md` found. Please create it or tell me which tasks to do.",
        ("Deployment blocked: needs the production database password, which only the "
         "ops team has."),
        ("Please run `sudo apt install libpq-dev` for me, since I have no root "
         "rights, then I can build the driver."),
        "Please review the plan above and confirm before I make any changes.",
        ("You'll need to grant the app the `calendar.read` scope; until then the sync "
         "can't be tested."),
        "There's no task in your message. Please describe what you need.",
    ),
}
DOES_NOT_ESCALATE = {
    "text_question": (
        "Port 8080 is used by the API, 5432 by the database and 6379 by the cache.",
        ("Loop 12: no open tasks are left in the plan, all 31 are checked. Nothing "
         "was changed in this loop."),
        ("I chose SQLite, since the spec leaves it open and nothing else is "
         "installed. The decision is noted in `docs/decisions.md`."),
        "Added validation. The API answers 422 if the confirmation is missing.",
        "I fixed the typo and ran the linter. Want me to fix the other 3 warnings?",
        ("I refactored `parse()`; behaviour is unchanged and tests pass. Would you "
         "like to see benchmarks?"),
        ("I've set the timeout to 30 s, as you requested. How about adding a metric "
         "for it later?"),
        "Loop finished: 3 of 9 tasks done, tests green. Next loop: task 4.",
        "Your call stack shows that `init` runs twice. I removed the second call.",
        ("Set `ALLOW_SIGNUP=false` to disable registration. Done in "
         "`docker-compose.yml`."),
        "Removed the popup \"Do you accept cookies?\" and its tests.",
        "I translated 41 strings. Which ones were unclear is noted in `TODO.md`.",
        "Finished the importer. Do you want me to run it against production?",
        ("I updated the diagram and the README. Is there something you'd like to "
         "change?"),
        ("The tests pass and the code is formatted. Do you want me to squash the "
         "commits?"),
        "Work on task 4 is complete; see the summary above. Anything else?",
        ("I've written 12 tests. 11 pass; the last one documents the known bug and is "
         "marked xfail."),
        "Bumped the version to 1.4.0. Should I tag it?",
        ("The config is loaded from `~/.app.toml`. You can override it with "
         "`APP_CONFIG`."),
        ("Everything is set up. Run `make dev` and open the browser. Let me know how "
         "it goes!"),
        "I corrected the header. Would you like the footer changed in the same way?",
        "Deleted 14 unused files. Nothing imports them; the build is green.",
        "Your request is implemented: the button is disabled until the form is valid.",
        "I implemented both variants behind a flag so that you can decide later.",
        "Fixed. (The question in the comment, \"why 7?\", is answered there too.)",
        "Build failed: `missing symbol _start`. I couldn't find the cause.",
    ),
    "text_request": (
        "The dialog now asks `Please confirm?` before it deletes.",
        "Added this:\n```js\nconst a = b ? c : d;\n// please confirm?\n```",
        "Renamed the flag. Please note that old scripts must be adapted.",
        "All set! Please restart the dev server and try it again.",
        "I've updated the styles. Please refresh the page to see the change.",
        ("The bug is fixed. Please verify on your side that the export now opens in "
         "Excel."),
        "Tests are green (212 passed). Please review the diff when you have a moment.",
        ("I've pushed the branch. Feel free to tell me if you want the commits "
         "squashed."),
        ("Renamed the module. If anything breaks in your scripts, let me know and "
         "I'll help."),
        ("Users now see \"Waiting for approval\" until an admin confirms the account. "
         "The e-mail says: \"Please confirm your address\"."),
        ("I changed the prompt of the bot to:\n\n> Please tell me your order number. "
         "What went wrong?\n\nThe tests pass."),
        ("Applied edit to src/app.py\n\nThe handler now closes the file. Please note "
         "that Python 3.9 is needed from now on."),
        ("I've added the dependency. Please run `npm install` before you start it "
         "again."),
        "The tests are in place. If they fail on your machine, send me the output.",
        ("You need two things to deploy this: a server with Docker, and a domain that "
         "points to it. Then run `docker compose up -d`.\n\nIf you tell me your "
         "hoster, I can give exact steps."),
        ("Wrote the runbook. It tells the on-call engineer what to do: 1. check the "
         "queue, 2. approve the failover, 3. confirm in the channel."),
        ("Deployed to staging: https://staging.example.com. Please take a look when "
         "you have time."),
        ("Updated the pricing page. Please note that the old plan must stay in the "
         "database until its last customer has left."),
        "Both services are running. Please let me know if you run into any problems.",
        "I added pagination. The client must send `page`; it gets 400 otherwise.",
        "Fixed the crash on start. Please update to see whether it helps.",
        "Created the role `approver`. Only approvers may confirm an order.",
        "I updated the template: \"Hi, could you please send us your invoice?\"",
    ),
    "text_blocked": (
        "Done. Let me know if anything else is needed.",
        ("Added the migration. You need to run `npm run migrate` before you start the "
         "server."),
        ("The flaky test was a race; it waits for the event now. 50 runs, all green. "
         "Let me know if you see it again."),
        ("I've implemented the feature behind a flag. To enable it in production, set "
         "`FEATURE_X=1`. You'll need to redeploy."),
        ("The wizard cannot continue until a file is chosen; I disabled the button "
         "for that."),
        ("Explanation of the file:\n\n- `main()` reads the flags\n- `run()` does the "
         "work\n\nIt exits with 1 when nothing matched."),
        ("Analysis finished. I found 3 issues in total, listed in `REPORT.md` with "
         "the lines concerned.\n\n1. Missing index\n2. Unused column\n3. Wrong type"),
        ("The tests could not be run because pytest is missing in this environment; "
         "the code compiles and the logic was checked by hand. Changes are committed."),
        ("I tried to fix the build but `cargo check` still fails with 3 errors in "
         "`lib.rs`. I could not resolve the lifetimes."),
        "Replaced the icons. You may need to clear the browser's cache to see them.",
        ("The cause is the missing `await` in line 40: the handler returns before the "
         "write ends. Adding it fixes the problem."),
        ("`git rebase -i` lets you reorder commits. You need to have a clean tree "
         "before you start it; then mark the commits with `squash`."),
        ("Reviewed the pull request: no blocking issues. Two nits: a typo in the "
         "docstring, and an unused import."),
        ("The webhook is implemented and tested against the mock. In production you "
         "will need to set `STRIPE_SECRET_KEY`."),
        ("Finished. Here's what happens when a visitor is blocked: the middleware "
         "answers 429 and waits for 60 seconds."),
        ("The error means that the port is in use. Stop the other process, or pass "
         "`--port 3001`."),
        ("I was not able to make the test pass. The assertion in line 88 still fails "
         "because the fixture returns two rows."),
        ("Implemented the retry; it stops after 5 attempts and waits for the server's "
         "`Retry-After`."),
        "The documentation is in place. Should you need more examples, just ask.",
        "I created the pull request. Once you merge it, the deploy starts by itself.",
        ("Migrated. When you start the app for the first time it will ask for a "
         "password."),
        "Answering your question: yes, the lock is needed, because two threads write.",
        ("The tests fail with `ECONNREFUSED`; the database container does not start "
         "on this machine. I could not finish the task."),
        "Done. To use it, you'll need to provide your own API key in the settings.",
        ("Here's how it works: the worker waits for a message, then it asks the API "
         "for the details."),
    ),
    "text_stuck": (
        "Added the approval page: a user can request access.",
        "Blocked accounts are now rejected; permissions are checked first.",
        "Created the Terraform module. To use it, you must set `TF_VAR_token` first.",
        ("Added the approval workflow: a manager must approve each expense, and the "
         "user needs permission `expense.submit`."),
        ("Implemented the permission check. A request without a token is answered "
         "with 401, and a blocked user gets 403."),
        ("The form now requires confirmation before it deletes anything. The user "
         "must type the name of the project."),
        ("The login page asks for credentials again after 30 minutes. The user has to "
         "enter the password once."),
        "Wrote the test: `it('cannot proceed without approval')`. It passes.",
        ("Added a `needs_approval` column and the screen that lists requests awaiting "
         "approval."),
        ("The pipeline now waits for permission from the environment's reviewers; I "
         "documented how to approve a run."),
        ("Human reviewers must sign off releases; I wrote that into `CONTRIBUTING.md` "
         "as you asked."),
        ("Use optional chaining: `user?.address?.city`. I changed the 6 places where "
         "it crashed."),
        ("RECOMMENDATION: Approve the merge of the branch, then run `npm start` and "
         "verify the page.\n\nI've finished the header and the footer. Build passes."),
        ("Verified: the endpoint responds in 40 ms. Known limitation: iOS users must "
         "enable notifications by hand."),
        ("The server is running on http://localhost:3000. You can log in with "
         "admin/admin."),
        ("Yes, that's correct. The user must have the role `editor` to see this "
         "button, and admins always see it."),
        ("The feature flag is off by default; an admin must turn it on in the "
         "settings. I documented it and added a test."),
        ("The type is `Promise<User | undefined>`, so callers must check it. Added "
         "the checks. `tsc` passes."),
        "Completed. You can now approve users on the admin page.",
        "The release is published. Users need to update to 2.1 to get the fix.",
        ("Test plan:\n\n- log in as a user without permission\n- the page should say "
         "\"You need approval\"\n\nAll cases pass."),
        "I've completed the code review. Recommendation: approve. No blockers.",
        ("The flow is: user signs up, admin must approve, user gets a mail. I drew it "
         "in `docs/flow.md`."),
        ("Added a hook that stops a commit when the message is empty. It needs no "
         "approval by anybody."),
    ),
}


def judged(text: str) -> ko.Verdict:
    return ko.judge(ko.AgentResult(
        ended=ko.Ended.EXIT, exit_code=0, has_result=True, text=text,
        subtype="success", terminal_reason="completed", events=5))


@pytest.mark.parametrize(("rule", "text"), [
    (rule, text) for rule, texts in ESCALATES.items() for text in texts])
def test_a_message_that_leaves_the_next_step_to_a_person_escalates(
        rule: str, text: str) -> None:
    verdict = judged(text)
    assert (verdict.status, verdict.rule) == (ko.VerdictStatus.NEEDS_HUMAN, rule)
    assert verdict.question is not None and verdict.question.text


@pytest.mark.parametrize(("rule", "text"), [
    (rule, text) for rule, texts in DOES_NOT_ESCALATE.items() for text in texts])
def test_a_message_that_only_sounds_like_it_does_not_escalate(
        rule: str, text: str) -> None:
    verdict = judged(text)
    assert verdict.status is ko.VerdictStatus.COMPLETED, (rule, verdict.question)


@pytest.mark.parametrize(("text", "question", "options"), [
    ("Two ways.\n\nWhich one should be built?\n\n- a queue\n* a cron job",
     "Which one should be built?", ("a queue", "a cron job")),
    ("It's ready.\n\n**Keep the old file?** [Y / N]", "Keep the old file?", ()),
    ("Drafted.\n\n**Select:** [A] Discuss it [C] Continue",
     "Select: [A] Discuss it [C] Continue", ("[A] Discuss it", "[C] Continue")),
    ("Shall I use `pnpm` or `npm`? Both work.", "Shall I use `pnpm` or `npm`?", ()),
])
def test_the_question_and_its_options_are_quoted_as_written(
        text: str, question: str, options: tuple[str, ...]) -> None:
    assert judged(text).question == ko.Question(question, options)
